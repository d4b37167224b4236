import { useState } from "preact/hooks";
import type { Input } from "../api/types";

/** A job's photo: the file that was sent or, where the browser does not know its format, the service's small copy. */
export function InputImage({ input, fit }: { input: Input; fit: "same-shape" | "other-shape" }) {
  const [known, setKnown] = useState(true);
  return (
    <img
      class={fit}
      src={known ? input.url : input.thumbnail_url}
      alt="Before"
      draggable={false}
      onError={() => setKnown(false)}
    />
  );
}
