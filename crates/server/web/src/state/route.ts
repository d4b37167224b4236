import { useEffect, useState } from "preact/hooks";

/** The id of the job that is looked at. It is the address's fragment, so that reloading and going back work. */
export function useViewedJob(): string | null {
  const [viewed, setViewed] = useState(fragment);
  useEffect(() => {
    const change = () => setViewed(fragment());
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);
  return viewed;
}

export function jobAddress(id: string | null): string {
  return id === null ? "#" : `#${encodeURIComponent(id)}`;
}

/** `null` goes to the photo that is to be edited. */
export function openJob(id: string | null): void {
  history.pushState(null, "", jobAddress(id));
  // Told at once, as the address of a job that is gone must not be looked up.
  dispatchEvent(new HashChangeEvent("hashchange"));
}

function fragment(): string | null {
  try {
    return decodeURIComponent(location.hash.slice(1)) || null;
  } catch {
    return null;
  }
}
