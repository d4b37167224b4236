/** What the service sends and takes under `/api`. Times are milliseconds since 1970, sizes pixels. */

export interface Service {
  version: string;
  model: string;
  /** Whether the model edits a photo. */
  edits: boolean;
  /** Whether it makes images from words alone. */
  generates: boolean;
  devices: string[];
  /** What a request gets that leaves them out; a model without guidance has `null`. */
  defaults: { steps: number; guidance: number | null };
  limits: {
    max_pixels: number;
    max_images: number;
    max_steps: number;
    max_upload_bytes: number;
    max_prompt_bytes: number;
  };
  requires_key: boolean;
}

export type Format = "png" | "jpeg" | "webp";

/** What is asked for; what is left out is the service's default. */
export interface JobRequest {
  prompt: string;
  seed?: number;
  num_images?: number;
  steps?: number;
  guidance?: number;
  width?: number;
  height?: number;
  aspect_ratio?: string;
  /** What the result should not look like, and how strongly: both or neither. */
  negative_prompt?: string;
  true_cfg?: number;
  /** Threshold of the step cache: faster, and another image. */
  cache?: number;
  output_format?: Format;
  /** Of a JPEG, 1 to 100. */
  quality?: number;
}

export type Status = "queued" | "running" | "done" | "failed" | "cancelled";

export interface Job {
  id: string;
  status: Status;
  created_at: number;
  started_at: number | null;
  finished_at: number | null;
  /** How many jobs are before it in the queue. */
  position: number | null;
  /** From 0 to 1. */
  progress: number;
  request: AcceptedRequest;
  model: string;
  input: Input | null;
  images: Result[];
  error: string | null;
  /** The command line that makes the same images. */
  command: string;
  /** How long it ran. */
  seconds: number | null;
}

/** A request as the service keeps it: seeds are drawn, and what was left out is `null`. */
export interface AcceptedRequest {
  prompt: string;
  seeds: number[];
  steps: number | null;
  guidance: number | null;
  width: number | null;
  height: number | null;
  aspect_ratio: string | null;
  negative_prompt: string | null;
  true_cfg: number | null;
  cache: number | null;
  output_format: Format;
  quality: number | null;
}

export interface Input {
  url: string;
  thumbnail_url: string;
  width: number;
  height: number;
  name: string | null;
}

export interface Result {
  index: number;
  url: string;
  thumbnail_url: string;
  seed: number;
  width: number;
  height: number;
  format: Format;
}

export interface Page {
  /** Newest first. */
  jobs: Job[];
  /** Where the next page begins: its `before`. */
  next: string | null;
}

/** A denoise step of a running job. */
export interface Step {
  /** Which of the job's images, from 0. */
  image: number;
  images: number;
  /** Steps of this image that are done. */
  step: number;
  steps: number;
  /** Of the whole job, from 0 to 1. */
  progress: number;
  /** A data URL of what the image looks like so far. */
  preview: string | null;
}

export function isActive(job: Job): boolean {
  return job.status === "queued" || job.status === "running";
}
