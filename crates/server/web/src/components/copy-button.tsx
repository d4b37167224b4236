import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";

const SHOWN_MILLISECONDS = 2000;

export function CopyButton({ text, children }: { text: string; children: ComponentChildren }) {
  const [said, setSaid] = useState<string | null>(null);
  const copy = async () => {
    setSaid((await copied(text)) ? "Copied" : "This browser does not allow copying");
    setTimeout(() => setSaid(null), SHOWN_MILLISECONDS);
  };
  return (
    <>
      <button type="button" title={text} onClick={copy}>
        {said ?? children}
      </button>
      <span class="unseen" role="status">
        {said}
      </span>
    </>
  );
}

async function copied(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over http from another computer there is no such clipboard, and the old way still works.
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "unseen";
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
