import type { ComponentChildren } from "preact";

interface Props {
  width: number;
  height: number;
  /** Whether a pixel of the image is one of the screen; else the image is as large as there is room. */
  actual?: boolean;
  children: ComponentChildren;
}

/** A place for one picture of `width` x `height` pixels, with its shape. */
export function Frame({ width, height, actual = false, children }: Props) {
  const style = { "--ratio": String(width / height), "--width": `${width / devicePixelRatio}px` };
  return (
    <div class={actual ? "viewport actual" : "viewport"}>
      <div class="frame" style={style}>
        {children}
      </div>
    </div>
  );
}
