import { useRef } from "preact/hooks";
import type { Service } from "../api/types";
import type { Draft } from "../state/use-draft";
import { SettingsFields } from "./settings-fields";
import { SourceRow } from "./source-row";

export const PROMPT_ID = "prompt";

interface Props {
  draft: Draft;
  service: Service;
  sending: boolean;
  /** Whether the picture is that of a job and not the photo. */
  viewing: boolean;
  choose(): void;
  run(): void;
}

export function EditForm({ draft, service, sending, viewing, choose, run }: Props) {
  const form = useRef<HTMLFormElement>(null);
  const words = draft.source === null;
  const { max_prompt_bytes } = service.limits;

  return (
    <form
      ref={form}
      onSubmit={(event) => {
        event.preventDefault();
        if (!sending) run();
      }}
      onKeyDown={(event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.current?.requestSubmit();
      }}
    >
      {service.edits && (draft.source !== null || viewing) && <SourceRow draft={draft} choose={choose} />}
      <label class="field">
        {words ? "What to show" : "What to change"}
        <textarea
          id={PROMPT_ID}
          rows={3}
          required
          placeholder={words ? "a red circle on a yellow background" : "make the circle blue"}
          value={draft.prompt}
          onInput={(event) => {
            const area = event.currentTarget;
            const bytes = new TextEncoder().encode(area.value).length;
            area.setCustomValidity(bytes > max_prompt_bytes ? `This is too long by ${bytes - max_prompt_bytes} bytes.` : "");
            draft.setPrompt(area.value);
          }}
        />
      </label>
      {words && !service.generates ? (
        <button type="button" class="primary" onClick={choose}>
          Choose a photo first
        </button>
      ) : (
        <button type="submit" class="primary" aria-disabled={sending} aria-keyshortcuts="Control+Enter">
          {sending ? "Sending" : words ? "Make an image" : "Edit the photo"}
        </button>
      )}
      <SettingsFields draft={draft} service={service} />
    </form>
  );
}
