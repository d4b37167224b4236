import { useEffect, useRef, useState } from "preact/hooks";
import { createJob, Refused } from "./api/client";
import { currentKey, forgetKey, setKey } from "./api/key";
import { isActive, type Job } from "./api/types";
import { EditForm, PROMPT_ID } from "./components/edit-form";
import { History } from "./components/history";
import { JobPicture } from "./components/job-picture";
import { KeyDialog } from "./components/key-dialog";
import { EmptyPicture, SourcePicture } from "./components/source-picture";
import { requestOf } from "./state/draft";
import { useJobs } from "./state/jobs";
import { jobAddress, openJob, useViewedJob } from "./state/route";
import { useService } from "./state/service";
import { useDraft } from "./state/use-draft";
import { useIncomingFiles } from "./state/use-incoming-files";
import { announcement } from "./text";

/** The page: the picture, the form of the edit, and what was made before. */
export function App() {
  const { service, silent } = useService();
  const [key, setKeyHere] = useState(currentKey);
  // Whether a request was answered with 401: the service may have got keys since it was asked what it is.
  const [refused, setRefused] = useState<"no key" | "this key" | null>(null);
  const [message, setMessage] = useState<string | null>(null);
  const [sending, setSending] = useState(false);
  const viewed = useViewedJob();
  const draft = useDraft();
  const chooser = useRef<HTMLInputElement>(null);
  const picture = useRef<HTMLElement>(null);

  const failed = (error: unknown) => {
    if (error instanceof Refused && error.status === 401) {
      setRefused(currentKey() === null ? "no key" : "this key");
      forgetKey();
      setKeyHere(null);
    } else {
      setMessage(error instanceof Error ? error.message : String(error));
    }
  };
  const askForKey = service !== null && (service.requires_key || refused !== null) && key === null;
  const ready = service !== null && !askForKey;
  const jobs = useJobs(ready, viewed, failed);
  const job = jobs.list?.find((other) => other.id === viewed) ?? null;

  const attempt = async (work: () => Promise<void> | void) => {
    setMessage(null);
    try {
      await work();
    } catch (error) {
      failed(error);
    }
  };

  const takePhoto = (file: File) =>
    attempt(() => {
      if (service === null) return;
      if (!service.edits) throw new Error(`${service.model} makes images from words alone and takes no photo.`);
      draft.accept(file, service);
      openJob(null);
    });
  const dropping = useIncomingFiles(takePhoto);
  const choose = () => chooser.current?.click();

  const run = () =>
    attempt(async () => {
      setSending(true);
      const version = draft.version();
      try {
        const made = await createJob(requestOf(draft.prompt, draft.settings), draft.source);
        jobs.put(made);
        draft.sent(made, version);
        openJob(made.id);
      } finally {
        setSending(false);
      }
    });

  // After a reload that names no job: one that is not over.
  const listed = jobs.list !== null;
  useEffect(() => {
    const running = viewed === null && !draft.begun ? jobs.list?.findLast(isActive) : undefined;
    if (running) openJob(running.id);
  }, [listed]);

  // On a phone the picture is above the button and the history that lead to it.
  useEffect(() => {
    if (job !== null) picture.current?.scrollIntoView();
  }, [job?.id]);

  // The form follows what is looked at, unless something was begun in it.
  useEffect(() => {
    if (job !== null && !draft.begun && draft.sameAs !== job.id) attempt(() => draft.reuse(job));
  }, [job?.id]);

  useEffect(() => {
    const running = job !== null && isActive(job);
    const share = jobs.step?.progress ?? job?.progress ?? 0;
    document.title = running ? `${Math.round(100 * share)} % · retouch` : "retouch";
  }, [job, jobs.step]);

  const actions = (of: Job) => ({
    cancel: () => jobs.remove(of.id),
    reuse: () => attempt(() => draft.reuse(of)),
    editResult: (index: number) =>
      attempt(async () => {
        const result = of.images[index];
        if (result === undefined) return;
        await draft.editResult(of, result);
        openJob(null);
        document.getElementById(PROMPT_ID)?.focus();
      }),
    keepSeed: (seed: number) => draft.set({ seed: String(seed) }),
  });

  const notice = silent || !jobs.reachable ? "The service does not answer. Trying again." : message;

  return (
    <>
      <header class="bar">
        <h1>retouch</h1>
        {service && (
          <p class="quiet model">
            {service.model} on {service.devices.join(", ")}
          </p>
        )}
        <a class="button" href={jobAddress(null)} onClick={draft.clear}>
          New
        </a>
      </header>

      <p class="unseen" role="status">
        {job && announcement(job, jobs.step)}
      </p>
      <div class="notice" role="alert">
        {notice !== null && (
          <p>
            <span>{notice}</span>
            {notice === message && (
              <button type="button" onClick={() => setMessage(null)}>
                Close
              </button>
            )}
          </p>
        )}
      </div>

      {service && (
        <main class="desk">
          <section ref={picture} class="picture" aria-labelledby="picture-heading">
            <h2 id="picture-heading" class="unseen">
              Picture
            </h2>
            {job ? (
              <JobPicture
                key={job.id}
                job={job}
                step={jobs.step}
                model={service.model}
                keptSeed={draft.settings.seed}
                inForm={draft.sameAs === job.id}
                {...actions(job)}
              />
            ) : draft.source ? (
              <SourcePicture source={draft.source} />
            ) : (
              <EmptyPicture service={service} choose={choose} />
            )}
          </section>
          <section class="edit" aria-labelledby="edit-heading">
            <h2 id="edit-heading" class="unseen">
              Edit
            </h2>
            <EditForm draft={draft} service={service} sending={sending} viewing={job !== null} choose={choose} run={run} />
          </section>
          <History jobs={jobs} viewed={viewed} />
        </main>
      )}

      <input
        ref={chooser}
        type="file"
        accept="image/*"
        aria-label="Photo"
        hidden
        onChange={(event) => {
          const file = event.currentTarget.files?.[0];
          // Choosing the same file again is to be a change too.
          event.currentTarget.value = "";
          if (file) takePhoto(file);
        }}
      />
      {dropping && (
        <div class="dropping">
          <p>Drop the photo to edit it</p>
        </div>
      )}
      {askForKey && (
        <KeyDialog
          refused={refused === "this key"}
          give={(value, keep) => {
            setKey(value, keep);
            setKeyHere(value);
            setMessage(null);
          }}
        />
      )}
    </>
  );
}
