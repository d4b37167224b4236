import { expect, test } from "vitest";
import type { AcceptedRequest } from "../../src/api/types";
import { DEFAULTS, requestOf, settingsOf } from "../../src/state/draft";

test("what is left as it is is left to the service", () => {
  expect(requestOf("  make it night\n", DEFAULTS)).toEqual({ prompt: "make it night" });
});

test("each field that is filled in is sent, and comes back from the request that was kept", () => {
  const settings = { ...DEFAULTS, steps: "8", guidance: "2.5", seed: "0", images: "3" };
  const sent = { prompt: "p", steps: 8, guidance: 2.5, seed: 0, num_images: 3 };
  const more = { ...settings, format: "jpeg" as const, quality: "80", avoid: "text", avoidance: "3", cache: "0.1" };
  const sentMore = { output_format: "jpeg", quality: 80, negative_prompt: "text", true_cfg: 3, cache: 0.1 } as const;
  const shape = { ...settings, size: "16:9" };
  const exact = { ...settings, size: "exact", width: "512", height: "256" };
  expect(requestOf("p", shape)).toEqual({ ...sent, aspect_ratio: "16:9" });
  expect(requestOf("p", exact)).toEqual({ ...sent, width: 512, height: 256 });
  expect(requestOf("p", more)).toEqual({ ...sent, ...sentMore });

  const kept: AcceptedRequest = {
    prompt: "p",
    seeds: [0, 1, 2],
    steps: 8,
    guidance: 2.5,
    width: null,
    height: null,
    aspect_ratio: "16:9",
    negative_prompt: null,
    true_cfg: null,
    cache: null,
    output_format: "png",
    quality: null,
  };
  expect(settingsOf(kept, "0")).toEqual(shape);
  expect(settingsOf({ ...kept, aspect_ratio: null, width: 512, height: 256 }, "0")).toEqual(exact);
  expect(settingsOf({ ...kept, ...sentMore, aspect_ratio: null }, "0")).toEqual(more);
});
