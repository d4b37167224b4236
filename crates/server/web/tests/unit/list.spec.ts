import { expect, test } from "vitest";
import type { Job, Status } from "../../src/api/types";
import { withJob, withPage } from "../../src/state/list";

function job(id: string, created_at: number, status: Status = "done"): Job {
  return { id, created_at, status } as Job;
}

const ids = (jobs: Job[]) => jobs.map((job) => job.id).join("");

test("a job is put where its time is, once", () => {
  const jobs = [job("c", 3), job("a", 1)];
  expect(ids(withJob(jobs, job("d", 4)))).toBe("dca");
  expect(ids(withJob(jobs, job("b", 2)))).toBe("cba");
  expect(ids(withJob(jobs, job("0", 0)))).toBe("ca0");
  expect(ids(withJob(jobs, job("a", 1)))).toBe("ca");
});

test("a job that is over stays over", () => {
  const jobs = [job("a", 1, "cancelled")];
  expect(withJob(jobs, job("a", 1, "running"))[0]?.status).toBe("cancelled");
  expect(withPage(jobs, { jobs: [job("a", 1, "running")], next: null })[0]?.status).toBe("cancelled");
  expect(withJob([job("a", 1, "queued")], job("a", 1, "running"))[0]?.status).toBe("running");
});

test("what a page should have and lacks is gone, and what is older than it stays", () => {
  const jobs = [job("d", 4), job("c", 3), job("b", 2), job("a", 1)];
  expect(ids(withPage(jobs, { jobs: [job("e", 5), job("c", 3)], next: "c" }))).toBe("ecba");
  expect(ids(withPage(jobs, { jobs: [job("c", 3)], next: null }))).toBe("c");
  expect(ids(withPage(jobs, { jobs: [], next: null }))).toBe("");
});
