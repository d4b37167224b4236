import { type ChildProcess, spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

export interface RunningService {
  url: string;
  stop(): Promise<void>;
}

/** Starts the program that `RETOUCH` names, with its embedded model and a state of its own. */
export async function startService(...flags: string[]): Promise<RunningService> {
  const program = process.env.RETOUCH;
  if (program === undefined) throw new Error("set RETOUCH to the retouch program that serves the page");
  const port = await freePort();
  const state = await mkdtemp(join(tmpdir(), "retouch-page-"));
  const child = spawn(program, ["serve", "--port", String(port), "--state", state, ...flags], {
    stdio: ["ignore", "ignore", "inherit"],
  });
  const url = `http://127.0.0.1:${port}/`;
  const stop = async () => {
    await ended(child);
    await rm(state, { recursive: true, force: true });
  };
  try {
    await answers(`${url}api/service`, child);
  } catch (error) {
    await stop();
    throw error;
  }
  return { url, stop };
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function answers(url: string, child: ChildProcess): Promise<void> {
  const end = Date.now() + 60_000;
  while (Date.now() < end) {
    if (child.exitCode !== null) throw new Error(`the service ended with code ${child.exitCode}`);
    try {
      if ((await fetch(url)).ok) return;
    } catch {
      // Not yet.
    }
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error("the service does not answer");
}

async function ended(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exit = new Promise((resolve) => child.once("exit", resolve));
  child.kill("SIGTERM");
  await exit;
}
