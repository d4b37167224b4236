import { execFileSync } from "node:child_process";
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { expect, test } from "vitest";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const DIST = join(ROOT, "dist");
// The page is fetched once, and a phone on a slow line should not wait for it.
const MOST_BYTES = 60_000;

/** The files of a folder, by their paths in it. */
async function files(folder: string): Promise<Map<string, Buffer>> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const paths = entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name));
  return new Map(
    await Promise.all(paths.sort().map(async (path) => [path.slice(folder.length), await readFile(path)] as const)),
  );
}

test("the committed page is what its sources give", async () => {
  const folder = await mkdtemp(join(tmpdir(), "retouch-dist-"));
  try {
    // Not in this process, whose environment says that it tests.
    const { NODE_ENV: _, ...env } = process.env;
    const vite = join(ROOT, "node_modules/vite/bin/vite.js");
    execFileSync(process.execPath, [vite, "build", "--outDir", folder, "--emptyOutDir"], { cwd: ROOT, env });
    const [built, committed] = [await files(folder), await files(DIST)];
    expect([...committed.keys()]).toEqual([...built.keys()]);
    const stale = [...built].filter(([path, content]) => !committed.get(path)?.equals(content));
    expect(stale.map(([path]) => path)).toEqual([]);
  } finally {
    await rm(folder, { recursive: true });
  }
});

test("the page is small", async () => {
  const sizes = Array.from(await files(DIST), ([, content]) => gzipSync(content).length);
  expect(sizes.reduce((sum, size) => sum + size)).toBeLessThan(MOST_BYTES);
});
