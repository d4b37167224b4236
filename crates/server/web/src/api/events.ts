import { getJob, openEvents, Refused, sleep } from "./client";
import { isActive, type Job, type Step } from "./types";

export interface ServerEvent {
  name: string;
  data: string;
}

/**
 * Server-sent events out of the text of a stream, as it arrives in pieces:
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
 *
 * `EventSource` would do this, but cannot send the key.
 */
export class EventParser {
  #rest = "";
  #name = "";
  #data: string[] = [];

  /** The events that `text` completes. */
  push(text: string): ServerEvent[] {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop() ?? "";
    const events: ServerEvent[] = [];
    for (const line of lines) {
      if (line !== "") this.#field(line);
      else {
        if (this.#data.length > 0) events.push({ name: this.#name || "message", data: this.#data.join("\n") });
        this.#name = "";
        this.#data = [];
      }
    }
    return events;
  }

  #field(line: string): void {
    const [, name, value] = /^([^:]*)(?:: ?(.*))?$/s.exec(line) ?? [];
    if (name === "event") this.#name = value ?? "";
    if (name === "data") this.#data.push(value ?? "");
  }
}

export interface Follower {
  job(job: Job): void;
  step(step: Step): void;
  /** Whether the service answers. */
  reachable(yes: boolean): void;
}

/**
 * Tells of a job until it is over. A stream that breaks is opened again after a while that doubles from half a second to
 * eight, and the job is asked for in between.
 *
 * Throws `Refused` where the service does not give the job.
 */
export async function follow(id: string, follower: Follower, signal: AbortSignal): Promise<void> {
  let wait = 500;
  while (!signal.aborted) {
    try {
      for await (const event of readEvents(await openEvents(id, signal))) {
        if (signal.aborted) return;
        wait = 500;
        follower.reachable(true);
        if (event.name === "step") follower.step(JSON.parse(event.data));
        if (event.name === "job") {
          const job: Job = JSON.parse(event.data);
          follower.job(job);
          if (!isActive(job)) return;
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status < 500) throw error;
    }
    await sleep(wait);
    wait = Math.min(2 * wait, 8000);
    if (signal.aborted) return;
    try {
      const job = await getJob(id);
      if (signal.aborted) return;
      follower.reachable(true);
      follower.job(job);
      if (!isActive(job)) return;
    } catch (error) {
      if (error instanceof Refused && error.status < 500) throw error;
      follower.reachable(false);
    }
  }
}

async function* readEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerEvent> {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    // Also when the loop over the events is left early: the service need not go on sending.
    reader.cancel().catch(() => {});
  }
}
