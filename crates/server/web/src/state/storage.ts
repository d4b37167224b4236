/** Storage of the browser, which may be switched off or full: then nothing is kept. */
type Kind = "session" | "local";

export function read(kind: Kind, name: string): string | null {
  try {
    return storage(kind).getItem(name);
  } catch {
    return null;
  }
}

/** `null` removes it. */
export function write(kind: Kind, name: string, value: string | null): void {
  try {
    if (value === null) storage(kind).removeItem(name);
    else storage(kind).setItem(name, value);
  } catch {
    // What is not kept is asked for again.
  }
}

function storage(kind: Kind): Storage {
  return kind === "session" ? sessionStorage : localStorage;
}
