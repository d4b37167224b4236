import { useEffect, useRef, useState } from "preact/hooks";
import type { Job, Step } from "../api/types";
import { duration, stage } from "../text";

interface Props {
  job: Job;
  step: Step | null;
  cancel(): void;
}

export function Progress({ job, step, cancel }: Props) {
  const [cancelling, setCancelling] = useState(false);
  const left = useTimeLeft(step);
  return (
    <div class="progress">
      <div>
        <p>{cancelling ? "Cancelling" : stage(job, step)}</p>
        {left !== null && !cancelling && <p class="quiet">about {duration(left)} left</p>}
        <button
          type="button"
          disabled={cancelling}
          onClick={() => {
            setCancelling(true);
            cancel();
          }}
        >
          Cancel
        </button>
      </div>
      <progress aria-label="Progress" max={1} value={step?.progress ?? job.progress} />
    </div>
  );
}

/** Seconds that the job will take from here, by its speed since this page has seen its first step. */
function useTimeLeft(step: Step | null): number | null {
  const first = useRef<{ progress: number; time: number } | null>(null);
  const [left, setLeft] = useState<number | null>(null);
  useEffect(() => {
    if (step === null) return;
    const now = { progress: step.progress, time: performance.now() };
    first.current ??= now;
    const done = now.progress - first.current.progress;
    const seconds = (now.time - first.current.time) / 1000;
    // Not before there is something to go by, and not where it would be gone before it is read.
    setLeft(done > 0 && seconds > 2 ? (seconds / done) * (1 - now.progress) : null);
  }, [step]);
  return left === null || left < 1 ? null : Math.ceil(left);
}
