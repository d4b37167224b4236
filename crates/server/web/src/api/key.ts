import { read, write } from "../state/storage";

const NAME = "retouch.key";

// Held here too, for a browser that stores nothing.
let key = read("session", NAME) ?? read("local", NAME);

/** The key that the service asks for, if it was given here: in this tab, or earlier and to be kept. */
export function currentKey(): string | null {
  return key;
}

export function setKey(value: string, keep: boolean): void {
  key = value;
  write("session", NAME, value);
  write("local", NAME, keep ? value : null);
}

export function forgetKey(): void {
  key = null;
  write("session", NAME, null);
  write("local", NAME, null);
}
