import { useEffect, useRef, useState } from "preact/hooks";
import { getImage } from "../api/client";
import type { Job, Result, Service } from "../api/types";
import { fileName } from "../text";
import { DEFAULTS, type Settings, settingsOf, type Source } from "./draft";

/** The edit that is being prepared. */
export interface Draft {
  source: Source | null;
  prompt: string;
  settings: Settings;
  /** The job that it is word for word what was asked of, if any. */
  sameAs: string | null;
  /** Whether there is work in it that is nowhere else. */
  begun: boolean;
  setPrompt(prompt: string): void;
  set(change: Partial<Settings>): void;
  /** Takes a photo that was dropped, pasted or chosen. Throws a sentence for one that the service would not take. */
  accept(file: File, service: Service): void;
  removeSource(): void;
  /** Takes over what a job was asked, its photo too; the seed stays. */
  reuse(job: Job): Promise<void>;
  /** Counts what is changed by hand. */
  version(): number;
  /** What it was at this version is this job now. */
  sent(job: Job, version: number): void;
  /** Makes a result the photo that is edited next. */
  editResult(job: Job, result: Result): Promise<void>;
  clear(): void;
}

export function useDraft(): Draft {
  const [source, setSource] = useState<Source | null>(null);
  const [prompt, setPrompt] = useState("");
  const [settings, setSettings] = useState(DEFAULTS);
  const [sameAs, setSameAs] = useState<string | null>(null);
  const [begun, setBegun] = useState(false);
  const version = useRef(0);
  // Counts what changes the photo: one that arrives after the next was asked for is late.
  const photos = useRef(0);

  const take = (blob: Blob, name: string) => {
    photos.current += 1;
    setSource({ blob, name, url: URL.createObjectURL(blob) });
  };
  const none = () => {
    photos.current += 1;
    setSource(null);
  };
  const fetched = async (url: string): Promise<Blob | null> => {
    photos.current += 1;
    const mine = photos.current;
    const blob = await getImage(url);
    return photos.current === mine ? blob : null;
  };
  const differs = (unsaved: boolean) => {
    version.current += 1;
    setSameAs(null);
    setBegun(unsaved);
  };
  const is = (job: Job) => {
    setSameAs(job.id);
    setBegun(false);
  };
  useEffect(() => () => source && URL.revokeObjectURL(source.url), [source]);

  return {
    source,
    prompt,
    settings,
    sameAs,
    begun,
    setPrompt(text) {
      setPrompt(text);
      differs(true);
    },
    set(change) {
      setSettings((before) => ({ ...before, ...change }));
      // A seed stays whatever is taken over, so that it cannot be lost.
      if (Object.keys(change).some((field) => field !== "seed")) differs(true);
    },
    accept(file, service) {
      const limit = service.limits.max_upload_bytes;
      // A type that the system does not know is empty, and for the service to find out.
      if (file.type !== "" && !file.type.startsWith("image/")) throw new Error(`“${file.name}” is not an image.`);
      if (file.size > limit) {
        throw new Error(`“${file.name}” has ${megabytes(file.size)}, and the service takes ${megabytes(limit)} at most.`);
      }
      take(file, file.name);
      differs(true);
    },
    removeSource() {
      none();
      differs(true);
    },
    async reuse(job) {
      const { input, request } = job;
      const before = version.current;
      if (input !== null) {
        const photo = await fetched(input.url);
        // What was begun in the meantime is worth more.
        if (photo === null || version.current !== before) return;
        take(photo, input.name ?? "photo");
      } else none();
      setPrompt(request.prompt);
      setSettings((before) => settingsOf(request, before.seed));
      is(job);
    },
    version: () => version.current,
    sent(job, sent) {
      if (version.current === sent) is(job);
    },
    async editResult(job, result) {
      setPrompt("");
      differs(true);
      const photo = await fetched(result.url);
      if (photo !== null) take(photo, fileName(job, result));
    },
    clear() {
      none();
      setPrompt("");
      differs(false);
    },
  };
}

function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
