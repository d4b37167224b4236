import { useEffect, useRef, useState } from "preact/hooks";
import { deleteJob, getJob, getJobs, Refused, Unreachable } from "../api/client";
import { follow } from "../api/events";
import { isActive, type Job, type Step } from "../api/types";
import { withJob, withPage } from "./list";
import { openJob } from "./route";

const POLL_MILLISECONDS = 2000;

export interface Jobs {
  /** Newest first; `null` until the service has listed them. */
  list: Job[] | null;
  /** Where older jobs begin, if there are any. */
  next: string | null;
  /** The last step of the viewed job. */
  step: Step | null;
  /** Whether the service answers. */
  reachable: boolean;
  put(job: Job): void;
  more(): Promise<void>;
  /** Cancels a job, or removes one that is over. */
  remove(id: string): Promise<void>;
}

/**
 * The service's jobs. The one that is viewed is followed by its events; the others, of which there can be more than a
 * browser has connections, by listing them from time to time while any of them is not over.
 */
export function useJobs(ready: boolean, viewed: string | null, failed: (error: unknown) => void): Jobs {
  const [list, setList] = useState<Job[] | null>(null);
  const [next, setNext] = useState<string | null>(null);
  const [step, setStep] = useState<Step | null>(null);
  const [reachable, setReachable] = useState(true);
  // Counts what was changed from here: a list that was asked for before that is out of date.
  const changes = useRef(0);
  const listed = useRef(false);

  const put = (job: Job) => {
    changes.current += 1;
    setList((jobs) => withJob(jobs ?? [], job));
  };

  const refresh = async (): Promise<void> => {
    const before = changes.current;
    try {
      const page = await getJobs(null);
      setReachable(true);
      if (changes.current !== before) return refresh();
      setList((jobs) => withPage(jobs ?? [], page));
      if (!listed.current) setNext(page.next);
      listed.current = true;
    } catch (error) {
      if (error instanceof Unreachable) setReachable(false);
      else failed(error);
    }
  };

  const more = async () => {
    if (next === null) return;
    try {
      const page = await getJobs(next);
      setList((jobs) => page.jobs.reduce(withJob, jobs ?? []));
      setNext(page.next);
    } catch (error) {
      failed(error);
    }
  };

  const remove = async (id: string) => {
    try {
      const job = await deleteJob(id);
      if (job !== null) return put(job);
    } catch (error) {
      // Removed elsewhere: all the same.
      if (!(error instanceof Refused && error.status === 404)) return failed(error);
    }
    changes.current += 1;
    if (id === viewed) openJob(null);
    setList((jobs) => (jobs ?? []).filter((job) => job.id !== id));
  };

  useEffect(() => {
    if (!ready) return;
    refresh();
    const look = () => document.visibilityState === "visible" && refresh();
    document.addEventListener("visibilitychange", look);
    return () => document.removeEventListener("visibilitychange", look);
  }, [ready]);

  const elsewhere = (list ?? []).some((job) => job.id !== viewed && isActive(job));
  const waiting = ready && (elsewhere || !reachable);
  useEffect(() => {
    if (!waiting) return;
    const timer = setInterval(refresh, POLL_MILLISECONDS);
    return () => clearInterval(timer);
  }, [waiting]);

  const job = list?.find((other) => other.id === viewed);
  const active = job !== undefined && isActive(job);
  useEffect(() => {
    setStep(null);
    if (!ready || viewed === null || !active) return;
    const leave = new AbortController();
    follow(viewed, { job: put, step: setStep, reachable: setReachable }, leave.signal).catch(failed);
    return () => leave.abort();
  }, [ready, viewed, active]);

  // One that is viewed by its address may be older than what is listed.
  const unknown = list !== null && viewed !== null && job === undefined;
  useEffect(() => {
    if (!unknown || viewed === null) return;
    getJob(viewed).then(put, (error) => {
      if (error instanceof Refused) openJob(null);
      failed(error);
    });
  }, [unknown, viewed]);

  return { list, next, step, reachable, put, more, remove };
}
