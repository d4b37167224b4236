import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import type { Page } from "playwright-core";

const AXE = createRequire(import.meta.url).resolve("axe-core/axe.min.js");

/** What axe-core objects to on the page, as it is shown now. */
export async function violations(page: Page): Promise<string[]> {
  // Through the debugger's connection, as the page's policy allows no other script.
  const session = await page.context().newCDPSession(page);
  await session.send("Runtime.evaluate", { expression: await readFile(AXE, "utf8") });
  const { result } = await session.send("Runtime.evaluate", {
    expression: `axe.run().then(({ violations }) => violations.flatMap((rule) =>
      rule.nodes.map((node) => rule.id + ": " + node.target + ": " + node.failureSummary)))`,
    awaitPromise: true,
    returnByValue: true,
  });
  return result.value;
}
