import { openJob } from "../state/route";
import type { Draft } from "../state/use-draft";

/** Which photo the next edit is of. */
export function SourceRow({ draft, choose }: { draft: Draft; choose(): void }) {
  const { source } = draft;
  if (source === null) {
    return (
      <button type="button" onClick={choose}>
        Choose a photo
      </button>
    );
  }
  return (
    <div class="source">
      <button type="button" class="thumbnail" aria-label="Show the photo" onClick={() => openJob(null)}>
        <img src={source.url} alt="" />
      </button>
      <div class="about">
        <p title={source.name}>{source.name}</p>
        <button type="button" class="plain" onClick={choose}>
          Replace
        </button>
        <button type="button" class="plain" onClick={draft.removeSource}>
          Remove
        </button>
      </div>
    </div>
  );
}
