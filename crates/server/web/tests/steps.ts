import type { Browser, Page } from "playwright-core";
import { colourAt, give, type Opened, openPage } from "./browser";

/** An edit of the drawn scene, whose circle is red. */
export const EDIT = "make the circle blue";
/** Enough steps for a job to run as long as a test wants it to. */
export const LONG_STEPS = 1000;

export const slider = (page: Page) => page.getByRole("slider", { name: "Compare before and after" });
export const comparison = (page: Page) => page.locator(".compare");
export const entries = (page: Page) => page.locator(".entry");
export const alert = (page: Page) => page.getByRole("alert");

export async function edit(page: Page, prompt: string, steps?: number): Promise<void> {
  await page.getByLabel("What to change").fill(prompt);
  if (steps !== undefined) await page.getByLabel("Steps").fill(String(steps));
  await page.getByRole("button", { name: "Edit the photo" }).click();
}

export async function finished(page: Page): Promise<void> {
  await slider(page).waitFor();
  await page.getByRole("progressbar").waitFor({ state: "detached" });
}

/** The page with a finished edit of the scene. */
export async function edited(browser: Browser, url: string, prompt = EDIT): Promise<Opened> {
  const opened = await openPage(browser, url);
  await give(opened.page, "drop", "scene.png");
  await edit(opened.page, prompt);
  await finished(opened.page);
  return opened;
}

/** What is seen where the scene has its circle. */
export async function circle(page: Page): Promise<"red" | "blue" | "neither"> {
  const [red, , blue] = await colourAt(comparison(page), 0.3, 0.34);
  if (Math.abs(red - blue) < 80) return "neither";
  return red > blue ? "red" : "blue";
}

export interface Progress {
  /** What was said, e.g. "Step 3 of 4". */
  said: string[];
  /** Values of the bar, from 0 to 1. */
  values: number[];
  /** Addresses of the pictures of the result so far. */
  previews: string[];
}

/** Keeps what the page shows of the progress of jobs from here on, each change once: a test may be too slow to look itself. */
export async function watch(page: Page): Promise<() => Promise<Progress>> {
  const seen = await page.evaluateHandle(() => {
    const progress: Progress = { said: [], values: [], previews: [] };
    const keep = <Value>(values: Value[], value: Value | null | undefined) => {
      if (value !== null && value !== undefined && value !== values.at(-1)) values.push(value);
    };
    new MutationObserver(() => {
      keep(progress.said, document.querySelector(".progress p")?.textContent);
      keep(progress.values, document.querySelector("progress")?.value);
      keep(progress.previews, document.querySelector('img[alt="The result so far"]')?.getAttribute("src"));
    }).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
    return progress;
  });
  return () => seen.jsonValue();
}
