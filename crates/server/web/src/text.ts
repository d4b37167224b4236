import type { Job, Result, Step } from "./api/types";

export function size(of: { width: number; height: number }): string {
  return `${of.width} × ${of.height}`;
}

export function duration(seconds: number): string {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
}

/** The time of day, with the day where it is not today. */
export function when(time: number, now = new Date()): string {
  const date = new Date(time);
  const today = date.toDateString() === now.toDateString();
  const day = { day: "numeric", month: "short" } as const;
  const minute = { hour: "2-digit", minute: "2-digit" } as const;
  return date.toLocaleString("en-GB", today ? minute : { ...day, ...minute });
}

export function percent(share: number): string {
  return `${Math.round(100 * share)} %`;
}

/** Where a job stands, to be read beside its progress. */
export function stage(job: Job, step: Step | null): string {
  if (job.status === "queued") {
    if (!job.position) return "Queued, next in line";
    return job.position === 1 ? "Queued, 1 before it" : `Queued, ${job.position} before it`;
  }
  if (job.status !== "running") return outcome(job);
  if (step === null) return "Starting";
  const steps = `step ${step.step} of ${step.steps}`;
  return step.images > 1 ? `Image ${step.image + 1} of ${step.images}, ${steps}` : `S${steps.slice(1)}`;
}

/** What a screen reader is told while a job runs: quarters, not each step. */
export function announcement(job: Job, step: Step | null): string {
  if (job.status !== "running") return job.status === "queued" ? stage(job, null) : outcome(job);
  const quarter = Math.floor(4 * (step?.progress ?? job.progress));
  return ["Running", "A quarter done", "Half done", "Three quarters done", "Almost done"][quarter] ?? "";
}

function outcome(job: Job): string {
  if (job.status === "cancelled") return "Cancelled";
  if (job.status === "failed") return "Failed";
  const images = job.images.length === 1 ? "1 image" : `${job.images.length} images`;
  return job.seconds === null ? `Done: ${images}` : `Done: ${images} in ${duration(job.seconds)}`;
}

/** A name for a downloaded result: the photo's, or the prompt's first words, with the seed. */
export function fileName(job: Job, result: Result): string {
  const source = job.input?.name?.replace(/\.[^.]*$/, "");
  const words = job.request.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.slice(0, 6);
  const stem = source ? `${source}-edited` : (words?.join("-") ?? "image");
  return `${stem}-${result.seed}.${result.format === "jpeg" ? "jpg" : result.format}`;
}
