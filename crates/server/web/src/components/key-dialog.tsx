import { useEffect, useRef, useState } from "preact/hooks";

interface Props {
  /** Whether a key was given that the service did not accept. */
  refused: boolean;
  give(key: string, keep: boolean): void;
}

/** Asks for the service's key, before anything else can be done. */
export function KeyDialog({ refused, give }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [key, setKey] = useState("");
  const [keep, setKeep] = useState(false);
  const open = () => dialog.current?.showModal();
  useEffect(open, []);

  return (
    <dialog ref={dialog} aria-labelledby="key-heading" onClose={open}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          give(key.trim(), keep);
        }}
      >
        <h2 id="key-heading">This service asks for a key</h2>
        {refused && <p role="alert">The service did not accept this key.</p>}
        <label class="field">
          Key
          <input
            type="password"
            required
            autocomplete="off"
            value={key}
            onInput={(event) => setKey(event.currentTarget.value)}
          />
        </label>
        <label class="check">
          <input type="checkbox" checked={keep} onChange={(event) => setKeep(event.currentTarget.checked)} />
          Keep it in this browser
        </label>
        <button type="submit" class="primary">
          Continue
        </button>
      </form>
    </dialog>
  );
}
