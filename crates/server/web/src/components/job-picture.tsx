import { useState } from "preact/hooks";
import { isActive, type Job, type Result, type Step } from "../api/types";
import { duration, fileName, size } from "../text";
import { Compare } from "./compare";
import { CopyButton } from "./copy-button";
import { Frame } from "./frame";
import { InputImage } from "./input-image";
import { Progress } from "./progress";

interface Props {
  job: Job;
  step: Step | null;
  /** The service's model now, which a job of long ago need not have had. */
  model: string;
  /** The seed that the next edit will have, as it is typed. */
  keptSeed: string;
  /** Whether the form holds what this job was asked. */
  inForm: boolean;
  cancel(): void;
  reuse(): void;
  editResult(index: number): void;
  keepSeed(seed: number): void;
}

/** A job: its image as it comes into being, then its results beside the photo. */
export function JobPicture({ job, step, model, keptSeed, inForm, cancel, reuse, editResult, keepSeed }: Props) {
  // The result that is looked at; while the job runs, none is the one that comes into being.
  const [chosen, setChosen] = useState<number | null>(null);
  const [actual, setActual] = useState(false);
  const active = isActive(job);
  const index = chosen ?? (active ? null : 0);
  const result = index === null ? undefined : job.images[index];

  return (
    <>
      {!result ? (
        <Unfinished job={job} step={step} />
      ) : job.input ? (
        <Compare before={job.input} after={result} actual={actual} />
      ) : (
        <Frame width={result.width} height={result.height} actual={actual}>
          <img src={result.url} alt={job.request.prompt} />
        </Frame>
      )}
      {job.images.length + Number(active) > 1 && (
        <ol class="results" aria-label="Results">
          {job.images.map((image, i) => (
            <li key={image.index}>
              <button type="button" aria-pressed={i === index} onClick={() => setChosen(i)}>
                <img src={image.thumbnail_url} alt={`Result ${i + 1}, seed ${image.seed}`} />
              </button>
            </li>
          ))}
          {active && (
            <li>
              <button type="button" aria-pressed={index === null} onClick={() => setChosen(null)}>
                Now
              </button>
            </li>
          )}
        </ol>
      )}
      {active && <Progress job={job} step={step} cancel={cancel} />}
      <div class="caption">
        <p class="prompt">{job.request.prompt}</p>
        <p class="quiet">{facts(job, result, model).join(" · ")}</p>
        {job.error !== null && <p class="error">{job.error}</p>}
        <div class="actions">
          {result && (
            <>
              <button type="button" onClick={() => editResult(index ?? 0)}>
                Edit this result
              </button>
              <a class="button" href={result.url} download={fileName(job, result)}>
                Download
              </a>
              <button type="button" onClick={() => keepSeed(result.seed)} disabled={keptSeed === String(result.seed)}>
                {keptSeed === String(result.seed) ? "Seed kept" : "Keep this seed"}
              </button>
            </>
          )}
          <button type="button" onClick={reuse} disabled={inForm}>
            Reuse settings
          </button>
          <CopyButton text={job.command}>Copy command</CopyButton>
          {result && (
            <button type="button" class="last" aria-pressed={actual} onClick={() => setActual(!actual)}>
              Actual size
            </button>
          )}
        </div>
      </div>
    </>
  );
}

/** The photo, and over it what the model has made of it so far. */
function Unfinished({ job, step }: { job: Job; step: Step | null }) {
  const [drawn, setDrawn] = useState<{ width: number; height: number } | null>(null);
  const preview = isActive(job) ? step?.preview : null;
  const { width, height } = drawn ?? askedShape(job) ?? job.input ?? { width: 1, height: 1 };
  return (
    <Frame width={width} height={height}>
      <div class="unfinished">
        {job.input && <InputImage input={job.input} fit="same-shape" />}
        {preview && (
          <img
            src={preview}
            alt="The result so far"
            onLoad={({ currentTarget: { naturalWidth, naturalHeight } }) =>
              setDrawn({ width: naturalWidth, height: naturalHeight })
            }
          />
        )}
      </div>
    </Frame>
  );
}

function askedShape({ request }: Job): { width: number; height: number } | null {
  if (request.width !== null && request.height !== null) return { width: request.width, height: request.height };
  const [width, height] = (request.aspect_ratio ?? "").split(":").map(Number);
  return width && height ? { width, height } : null;
}

function facts(job: Job, result: Result | undefined, model: string): string[] {
  const { steps, guidance, seeds } = job.request;
  return [
    job.status === "failed" || job.status === "cancelled" ? job.status : undefined,
    result && size(result),
    result ? `seed ${result.seed}` : seeds.length > 1 ? `seeds ${seeds[0]} to ${seeds.at(-1)}` : `seed ${seeds[0]}`,
    steps === null ? undefined : steps === 1 ? "1 step" : `${steps} steps`,
    guidance === null ? undefined : `guidance ${guidance}`,
    job.seconds === null ? undefined : duration(job.seconds),
    job.model === model ? undefined : job.model,
  ].filter((fact) => fact !== undefined);
}
