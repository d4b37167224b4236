import { expect, test } from "vitest";
import { EventParser } from "../../src/api/events";

const STREAM = [
  ": keep-alive",
  "",
  "event: job",
  'data: {"id":"a"}',
  "",
  "data:first",
  "data: second: with a colon",
  "retry: 10",
  "",
  "event: lost, it has no data",
  "",
  "event: step",
  "data: cut off",
].join("\n");

const EVENTS = [
  { name: "job", data: '{"id":"a"}' },
  { name: "message", data: "first\nsecond: with a colon" },
];

test.each(["\n", "\r\n", "\r"])("events end where a line is empty, with lines ended by %j", (end) => {
  expect(new EventParser().push(STREAM.replaceAll("\n", end))).toEqual(EVENTS);
});

test.each(["\n", "\r\n"])("where a stream is cut into pieces makes no difference, with lines ended by %j", (end) => {
  const text = STREAM.replaceAll("\n", end);
  for (let cut = 0; cut <= text.length; cut++) {
    const parser = new EventParser();
    expect([...parser.push(text.slice(0, cut)), ...parser.push(text.slice(cut))]).toEqual(EVENTS);
  }
});
