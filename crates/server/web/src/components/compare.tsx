import { useRef, useState } from "preact/hooks";
import type { Input, Result } from "../api/types";
import { percent } from "../text";
import { Frame } from "./frame";
import { InputImage } from "./input-image";

// How far shapes may be apart and still be of the same picture: sizes are rounded to what the model makes.
const SAME_SHAPE = 0.06;

interface Props {
  before: Input;
  after: Result;
  actual: boolean;
}

/** Two pictures on top of each other, and a line that parts them: on its left is the one before, on its right the one after. */
export function Compare({ before, after, actual }: Props) {
  const [share, setShare] = useState(0.5);
  const area = useRef<HTMLDivElement>(null);
  const handle = useRef<HTMLDivElement>(null);

  const move = (to: number) => setShare(Math.min(1, Math.max(0, to)));
  const follow = (event: PointerEvent) => {
    const box = area.current?.getBoundingClientRect();
    if (box && box.width > 0) move((event.clientX - box.left) / box.width);
  };
  const press = (event: PointerEvent) => {
    const onHandle = event.target instanceof Node && handle.current?.contains(event.target);
    // What is larger than its place is moved by dragging it, and the line by its handle alone.
    if (event.button !== 0 || (actual && !onHandle)) return;
    event.preventDefault();
    area.current?.setPointerCapture(event.pointerId);
    handle.current?.focus({ preventScroll: true });
    follow(event);
  };
  const drag = (event: PointerEvent) => {
    if (area.current?.hasPointerCapture(event.pointerId)) follow(event);
  };
  const keys = (event: KeyboardEvent) => {
    const small = event.shiftKey ? 0.1 : 0.02;
    const to = {
      ArrowLeft: share - small,
      ArrowDown: share - small,
      ArrowRight: share + small,
      ArrowUp: share + small,
      PageDown: share - 0.1,
      PageUp: share + 0.1,
      Home: 0,
      End: 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    move(to);
  };

  const shape = before.width / before.height / (after.width / after.height);
  const fit = Math.abs(shape - 1) < SAME_SHAPE ? "same-shape" : "other-shape";
  return (
    <Frame width={after.width} height={after.height} actual={actual}>
      <div ref={area} class="compare" onPointerDown={press} onPointerMove={drag}>
        <img src={after.url} alt="After" draggable={false} />
        <div class="before" style={{ clipPath: `inset(0 ${100 * (1 - share)}% 0 0)` }}>
          <InputImage input={before} fit={fit} />
        </div>
        <span class="tag left" hidden={share < 0.2}>
          Before
        </span>
        <span class="tag right" hidden={share > 0.8}>
          After
        </span>
        <div class="line" style={{ left: `${100 * share}%` }}>
          <div
            ref={handle}
            class="handle"
            role="slider"
            tabIndex={0}
            aria-label="Compare before and after"
            aria-orientation="horizontal"
            aria-valuemin={0}
            aria-valuemax={100}
            aria-valuenow={Math.round(100 * share)}
            aria-valuetext={`${percent(share)} before, ${percent(1 - share)} after`}
            onKeyDown={keys}
          >
            <svg viewBox="0 0 24 24" aria-hidden="true">
              <path d="M9 6l-6 6 6 6M15 6l6 6-6 6" />
            </svg>
          </div>
        </div>
      </div>
    </Frame>
  );
}
