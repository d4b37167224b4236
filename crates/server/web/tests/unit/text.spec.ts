import { expect, test } from "vitest";
import type { Job, Result } from "../../src/api/types";
import { duration, fileName, when } from "../../src/text";

test("durations are read at a glance", () => {
  expect([0.42, 9.94, 59.4, 59.6, 125].map(duration)).toEqual(["0.4 s", "9.9 s", "59 s", "1 min 00 s", "2 min 05 s"]);
});

test("the day is named where it is not today", () => {
  const now = new Date(2026, 10, 23, 12, 0);
  expect(when(new Date(2026, 10, 23, 9, 5).getTime(), now)).toBe("09:05");
  expect(when(new Date(2026, 10, 22, 9, 5).getTime(), now)).toBe("22 Nov, 09:05");
});

test("a result is named after its photo, or else its prompt", () => {
  const result = { seed: 7, format: "jpeg" } as Result;
  const named = (prompt: string, name: string | null) =>
    fileName({ request: { prompt }, input: name === null ? null : { name } } as Job, result);
  expect(named("make it night", "my.photo.png")).toBe("my.photo-edited-7.jpg");
  expect(named('A red <img src=x> & "été" on two more words', null)).toBe("a-red-img-src-x-été-7.jpg");
  expect(named("…", null)).toBe("image-7.jpg");
});
