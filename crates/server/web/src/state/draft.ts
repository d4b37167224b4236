import type { AcceptedRequest, Format, JobRequest } from "../api/types";

/** The photo that is to be edited. */
export interface Source {
  blob: Blob;
  name: string;
  /** An object URL of `blob`. */
  url: string;
}

/** The form's fields as they are typed; an empty one leaves the choice to the service. */
export interface Settings {
  /** Like the photo, `"exact"`, or an aspect ratio such as `"16:9"`. */
  size: string;
  width: string;
  height: string;
  steps: string;
  guidance: string;
  seed: string;
  images: string;
  format: Format;
  /** Of a JPEG. */
  quality: string;
  avoid: string;
  /** How strongly to avoid that; says nothing alone. */
  avoidance: string;
  cache: string;
}

export const LIKE_THE_PHOTO = "";
export const EXACT = "exact";

export const DEFAULTS: Settings = {
  size: LIKE_THE_PHOTO,
  width: "",
  height: "",
  steps: "",
  guidance: "",
  seed: "",
  images: "1",
  format: "png",
  quality: "",
  avoid: "",
  avoidance: "2",
  cache: "",
};

/** What is sent for these fields: what is left to the service is left out. */
export function requestOf(prompt: string, settings: Settings): JobRequest {
  const request: JobRequest = { prompt: prompt.trim() };
  if (settings.size === EXACT) {
    request.width = Number(settings.width);
    request.height = Number(settings.height);
  } else if (settings.size !== LIKE_THE_PHOTO) {
    request.aspect_ratio = settings.size;
  }
  if (settings.steps !== "") request.steps = Number(settings.steps);
  if (settings.guidance !== "") request.guidance = Number(settings.guidance);
  if (settings.seed !== "") request.seed = Number(settings.seed);
  if (Number(settings.images) > 1) request.num_images = Number(settings.images);
  if (settings.format !== "png") request.output_format = settings.format;
  if (settings.format === "jpeg" && settings.quality !== "") request.quality = Number(settings.quality);
  if (settings.avoid.trim() !== "") {
    request.negative_prompt = settings.avoid.trim();
    request.true_cfg = Number(settings.avoidance);
  }
  if (settings.cache !== "") request.cache = Number(settings.cache);
  return request;
}

/** The fields of an earlier request, but for its seed: `seed` stays as it is. */
export function settingsOf(request: AcceptedRequest, seed: string): Settings {
  const text = (value: number | null) => (value === null ? "" : String(value));
  const exact = request.width !== null && request.height !== null;
  return {
    size: exact ? EXACT : (request.aspect_ratio ?? LIKE_THE_PHOTO),
    width: exact ? text(request.width) : "",
    height: exact ? text(request.height) : "",
    steps: text(request.steps),
    guidance: text(request.guidance),
    seed,
    images: String(request.seeds.length),
    format: request.output_format,
    quality: text(request.quality),
    avoid: request.negative_prompt ?? "",
    avoidance: request.true_cfg === null ? DEFAULTS.avoidance : text(request.true_cfg),
    cache: text(request.cache),
  };
}
