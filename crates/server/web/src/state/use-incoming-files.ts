import { useEffect, useRef, useState } from "preact/hooks";

/** Hands over files that are dropped anywhere on the page, or pasted; answers whether one is held over it now. */
export function useIncomingFiles(take: (file: File) => void): boolean {
  const [over, setOver] = useState(false);
  const latest = useRef(take);
  latest.current = take;

  useEffect(() => {
    // Each element that is passed over tells of entering it before the one before tells of leaving.
    let depth = 0;
    const hover = (change: number) => (event: DragEvent) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = Math.max(0, depth + change);
      setOver(depth > 0);
    };
    const enter = hover(1);
    const move = hover(0);
    const leave = hover(-1);
    const drop = (event: DragEvent) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      setOver(false);
      handOver(event.dataTransfer);
    };
    const paste = (event: ClipboardEvent) => {
      // From an office program a text comes with a picture of itself.
      const text = event.target instanceof HTMLTextAreaElement && event.clipboardData?.types.includes("text/plain");
      if (text || !event.clipboardData?.files.length) return;
      event.preventDefault();
      handOver(event.clipboardData);
    };
    const handOver = (transfer: DataTransfer | null) => {
      const file = transfer?.files[0];
      if (file) latest.current(file);
    };
    addEventListener("dragenter", enter);
    addEventListener("dragover", move);
    addEventListener("dragleave", leave);
    addEventListener("drop", drop);
    addEventListener("paste", paste);
    return () => {
      removeEventListener("dragenter", enter);
      removeEventListener("dragover", move);
      removeEventListener("dragleave", leave);
      removeEventListener("drop", drop);
      removeEventListener("paste", paste);
    };
  }, []);
  return over;
}

function hasFiles(event: DragEvent): boolean {
  return event.dataTransfer?.types.includes("Files") ?? false;
}
