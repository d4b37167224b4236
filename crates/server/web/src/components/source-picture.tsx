import { useState } from "preact/hooks";
import type { Service } from "../api/types";
import type { Source } from "../state/draft";
import { size } from "../text";
import { Frame } from "./frame";

/** The photo that is to be edited. */
export function SourcePicture({ source }: { source: Source }) {
  const [shape, setShape] = useState({ width: 1, height: 1 });
  // Such as TIFF, which the service reads and most browsers do not.
  const [shown, setShown] = useState<"loading" | "yes" | "no">("loading");
  return (
    <>
      {shown === "no" ? (
        <p class="empty">This browser cannot show “{source.name}”. The service may still read it.</p>
      ) : (
        <Frame {...shape}>
          <img
            key={source.url}
            src={source.url}
            alt={`The photo: ${source.name}`}
            hidden={shown === "loading"}
            onLoad={({ currentTarget: { naturalWidth, naturalHeight } }) => {
              setShape({ width: naturalWidth, height: naturalHeight });
              setShown("yes");
            }}
            onError={() => setShown("no")}
          />
        </Frame>
      )}
      <div class="caption">
        <p>{source.name}</p>
        {shown === "yes" && <p class="quiet">{size(shape)}</p>}
      </div>
    </>
  );
}

/** Where there is no photo yet. */
export function EmptyPicture({ service, choose }: { service: Service; choose(): void }) {
  if (!service.edits) return <p class="empty">{service.model} makes images from words alone.</p>;
  return (
    <button type="button" class="empty" onClick={choose}>
      <strong>Choose a photo</strong>
      <span>or drop one anywhere on this page, or paste it</span>
      {service.generates && <span>Without a photo, the model makes an image from words alone.</span>}
    </button>
  );
}
