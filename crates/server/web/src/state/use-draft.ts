import { useEffect, useState } from "preact/hooks";
import { getImage } from "../api/client";
import type { Job, Result, Service } from "../api/types";
import { fileName } from "../text";
import { DEFAULTS, type Settings, settingsOf, type Source } from "./draft";

/** The edit that is being prepared. */
export interface Draft {
  source: Source | null;
  prompt: string;
  settings: Settings;
  setPrompt(prompt: string): void;
  set(change: Partial<Settings>): void;
  /** Takes a photo that was dropped, pasted or chosen. Throws a sentence for one that the service would not take. */
  accept(file: File, service: Service): void;
  removeSource(): void;
  /** Takes over what a job was asked, its photo too; the seed stays. */
  reuse(job: Job): Promise<void>;
  /** Makes a result the photo that is edited next. */
  editResult(job: Job, result: Result): Promise<void>;
  clear(): void;
}

export function useDraft(): Draft {
  const [source, setSource] = useState<Source | null>(null);
  const [prompt, setPrompt] = useState("");
  const [settings, setSettings] = useState(DEFAULTS);

  const take = (blob: Blob, name: string) => setSource({ blob, name, url: URL.createObjectURL(blob) });
  useEffect(() => () => source && URL.revokeObjectURL(source.url), [source]);

  return {
    source,
    prompt,
    settings,
    setPrompt,
    set: (change) => setSettings((before) => ({ ...before, ...change })),
    accept(file, service) {
      const limit = service.limits.max_upload_bytes;
      if (!file.type.startsWith("image/")) throw new Error(`“${file.name}” is not an image.`);
      if (file.size > limit) {
        throw new Error(`“${file.name}” has ${megabytes(file.size)}, and the service takes ${megabytes(limit)} at most.`);
      }
      take(file, file.name);
    },
    removeSource: () => setSource(null),
    async reuse(job) {
      const { input, request } = job;
      if (input === null) setSource(null);
      else take(await getImage(input.url), input.name ?? "photo");
      setPrompt(request.prompt);
      setSettings((before) => settingsOf(request, before.seed));
    },
    async editResult(job, result) {
      take(await getImage(result.url), fileName(job, result));
      setPrompt("");
    },
    clear() {
      setSource(null);
      setPrompt("");
    },
  };
}

function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
