import { useRef, useState } from "preact/hooks";
import { isActive, type Job } from "../api/types";
import type { Jobs } from "../state/jobs";
import { jobAddress } from "../state/route";
import { percent, when } from "../text";

interface Props {
  jobs: Jobs;
  viewed: string | null;
}

/** What was made before, newest first. */
export function History({ jobs, viewed }: Props) {
  const heading = useRef<HTMLHeadingElement>(null);
  const remove = async (job: Job) => {
    await jobs.remove(job.id);
    // The button that had the focus is gone.
    if (!isActive(job)) heading.current?.focus();
  };
  return (
    <section class="history" aria-labelledby="history-heading">
      <h2 ref={heading} id="history-heading" tabIndex={-1}>
        History
      </h2>
      {jobs.list?.length === 0 && <p class="quiet">Your edits will be kept here.</p>}
      <ol>
        {jobs.list?.map((job) => (
          <Entry
            key={job.id}
            job={job}
            progress={job.id === viewed && jobs.step ? jobs.step.progress : job.progress}
            viewed={job.id === viewed}
            remove={() => remove(job)}
          />
        ))}
        {jobs.next !== null && (
          <li class="more">
            <button type="button" onClick={jobs.more}>
              Show older
            </button>
          </li>
        )}
      </ol>
    </section>
  );
}

interface EntryProps {
  job: Job;
  progress: number;
  viewed: boolean;
  remove(): void;
}

function Entry({ job, progress, viewed, remove }: EntryProps) {
  // Removing is for good, so that it takes a second press.
  const [sure, setSure] = useState(false);
  const active = isActive(job);
  const thumbnail = job.images[0]?.thumbnail_url ?? job.input?.thumbnail_url;
  const what = active ? "Cancel" : sure ? "Press again to delete" : "Delete";
  return (
    <li class={viewed ? "entry viewed" : "entry"}>
      <a href={jobAddress(job.id)} aria-current={viewed ? "true" : undefined}>
        {thumbnail ? <img src={thumbnail} alt="" loading="lazy" /> : <span class="blank" />}
        <span class="words">
          <span class="prompt">{job.request.prompt}</span>
          <span class="quiet">{state(job, progress)}</span>
        </span>
      </a>
      <button
        type="button"
        class={sure ? "delete sure" : "delete"}
        aria-label={`${what}: ${job.request.prompt}`}
        title={what}
        onClick={() => (active || sure ? remove() : setSure(true))}
        onBlur={() => setSure(false)}
      >
        {sure ? "Delete" : "×"}
      </button>
    </li>
  );
}

function state(job: Job, progress: number): string {
  switch (job.status) {
    case "queued":
      return "queued";
    case "running":
      return `running, ${percent(progress)}`;
    case "failed":
      return `failed, ${when(job.created_at)}`;
    case "cancelled":
      return `cancelled, ${when(job.created_at)}`;
    case "done":
      return job.images.length > 1 ? `${when(job.created_at)}, ${job.images.length} images` : when(job.created_at);
  }
}
