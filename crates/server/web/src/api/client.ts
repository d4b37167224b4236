import { currentKey } from "./key";
import type { Job, JobRequest, Page, Service } from "./types";

/** A request that the service refused, with its sentence. */
export class Refused extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

/** The service did not answer. */
export class Unreachable extends Error {
  constructor() {
    super("The service does not answer. Is “retouch serve” still running?");
  }
}

export async function getService(): Promise<Service> {
  return json(await call("/api/service"));
}

export async function getJobs(before: string | null): Promise<Page> {
  const query = new URLSearchParams({ limit: "50" });
  if (before !== null) query.set("before", before);
  return json(await call(`/api/jobs?${query}`));
}

export async function getJob(id: string): Promise<Job> {
  return json(await call(jobPath(id)));
}

/** Cancels a job that is not over, and answers it; removes one that is, with its images, and answers `null`. */
export async function deleteJob(id: string): Promise<Job | null> {
  const response = await call(jobPath(id), { method: "DELETE" });
  return response.status === 204 ? null : json(response);
}

/**
 * Submits a job. Where the answer does not arrive it is submitted again under the same idempotency key, so that it runs
 * once however often it was heard.
 */
export async function createJob(request: JobRequest, image: { blob: Blob; name: string } | null): Promise<Job> {
  const body = new FormData();
  body.set("request", JSON.stringify(request));
  if (image !== null) body.set("image", image.blob, image.name);
  const headers = { "idempotency-key": randomName() };
  for (const wait of [1000, 3000]) {
    try {
      return await json(await call("/api/jobs", { method: "POST", body, headers }));
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      await sleep(wait);
    }
  }
  return json(await call("/api/jobs", { method: "POST", body, headers }));
}

/** An image of a job. Its address is signed and needs no key. */
export async function getImage(url: string): Promise<Blob> {
  return (await call(url)).blob();
}

/** The stream of a job's events, for `readEvents`. */
export async function openEvents(id: string, signal: AbortSignal): Promise<ReadableStream<Uint8Array>> {
  const response = await call(`${jobPath(id)}/events`, { signal, headers: { accept: "text/event-stream" } });
  if (response.body === null) throw new Unreachable();
  return response.body;
}

function jobPath(id: string): string {
  return `/api/jobs/${encodeURIComponent(id)}`;
}

async function call(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  const key = currentKey();
  if (key !== null && path.startsWith("/api/")) headers.set("x-key", key);
  let response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    throw init.signal?.aborted ? error : new Unreachable();
  }
  if (!response.ok) throw new Refused(await sentence(response), response.status);
  return response;
}

async function json<T>(response: Response): Promise<T> {
  try {
    return await response.json();
  } catch {
    throw new Unreachable();
  }
}

async function sentence(response: Response): Promise<string> {
  try {
    const { error } = await response.json();
    if (typeof error.message === "string") return error.message;
  } catch {
    // Not the service's own answer: a proxy's, for example.
  }
  return `The service answered with status ${response.status}.`;
}

/** 128 random bits. Not `crypto.randomUUID`, which a page has only over https or from this computer. */
function randomName(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function sleep(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
