import { isActive, type Job, type Page } from "../api/types";

/** `jobs`, newest first, with `job` in its place. */
export function withJob(jobs: Job[], job: Job): Job[] {
  const known = jobs.find((other) => other.id === job.id);
  // An answer that took long must not wake a job that is over.
  if (known && !isActive(known) && isActive(job)) return jobs;
  const others = jobs.filter((other) => other.id !== job.id);
  const place = others.findIndex((other) => other.created_at < job.created_at);
  return others.toSpliced(place < 0 ? others.length : place, 0, job);
}

/** `jobs` with what a page of the service's list says: of the time that the page covers, what it lacks is gone. */
export function withPage(jobs: Job[], page: Page): Job[] {
  const last = page.jobs.at(-1);
  const older = page.next === null || last === undefined ? [] : jobs.filter((job) => job.created_at < last.created_at);
  const known = new Map(jobs.map((job) => [job.id, job]));
  const listed = page.jobs.map((job) => {
    const before = known.get(job.id);
    return before && !isActive(before) && isActive(job) ? before : job;
  });
  return [...listed, ...older];
}
