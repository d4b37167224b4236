import type { Browser } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import { violations } from "./axe";
import { fixture, give, launch, openPage } from "./browser";
import { type RunningService, startService } from "./service";
import { alert, comparison, EDIT, edit, edited, finished, LONG_STEPS, slider } from "./steps";

let service: RunningService;
let browser: Browser;

beforeAll(async () => {
  [service, browser] = await Promise.all([startService(), launch()]);
});

afterAll(async () => {
  await browser?.close();
  await service?.stop();
});

test("the keyboard is enough", async () => {
  const { page } = await openPage(browser, service.url);
  await page.getByRole("button", { name: "Choose a photo" }).waitFor();
  const tabTo = async (name: RegExp) => {
    for (let presses = 0; presses < 60; presses++) {
      await page.keyboard.press("Tab");
      const focus = await page.evaluate(() => {
        const at = document.activeElement as HTMLElement;
        return at.getAttribute("aria-label") ?? at.closest("label")?.firstChild?.textContent ?? at.innerText;
      });
      if (name.test(focus)) return;
    }
    throw new Error(`${name} cannot be reached`);
  };
  const chooser = page.waitForEvent("filechooser");
  await tabTo(/^Choose a photo/);
  await page.keyboard.press("Enter");
  await (await chooser).setFiles(fixture("scene.png"));
  await tabTo(/^What to change/);
  await page.keyboard.type(EDIT);
  await page.keyboard.press("Control+Enter");
  await finished(page);
  await tabTo(/^Compare before and after/);
  await page.keyboard.press("Home");
  expect(await slider(page).getAttribute("aria-valuetext")).toBe("0 % before, 100 % after");
  await tabTo(/^Edit this result/);
  await page.keyboard.press("Space");
  await page.getByAltText(/^The photo: scene-edited/).waitFor();
  expect(await page.evaluate(() => document.activeElement?.tagName)).toBe("TEXTAREA");
  await page.context().close();
});

test("on a phone nothing is wider than the screen", async () => {
  const { page } = await edited(browser, service.url, `make the circle blue ${"and-a-word-that-is-too-long".repeat(8)}`);
  for (const width of [320, 360, 390, 768]) {
    await page.setViewportSize({ width, height: 780 });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    expect(wide, `at ${width} pixels`).toBe(width);
  }
  await page.setViewportSize({ width: 360, height: 780 });
  const box = (await comparison(page).boundingBox())!;
  expect(box.width).toBe(360);
  await page.context().close();
});

test("a finger moves the line across, and the page up and down", async () => {
  const phone = { viewport: { width: 360, height: 640 }, hasTouch: true, isMobile: true, reducedMotion: "reduce" } as const;
  const { page } = await openPage(browser, service.url, phone);
  await give(page, "drop", "scene.png");
  await edit(page, EDIT);
  await finished(page);
  // In view, although the button that was pressed is far below.
  const box = (await comparison(page).boundingBox())!;
  expect(box.y).toBeCloseTo(0, 0);
  const session = await page.context().newCDPSession(page);
  const drag = async (dx: number, dy: number) => {
    const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
    const touch = (type: "touchStart" | "touchMove", part: number) =>
      session.send("Input.dispatchTouchEvent", { type, touchPoints: [{ x: x + part * dx, y: y + part * dy }] });
    await touch("touchStart", 0);
    for (let part = 0.1; part <= 1; part += 0.1) await touch("touchMove", part);
    await session.send("Input.dispatchTouchEvent", { type: "touchEnd", touchPoints: [] });
  };
  await drag(-90, 0);
  expect(Number(await slider(page).getAttribute("aria-valuenow"))).toBeCloseTo(25, -1);
  const before = await page.evaluate(() => scrollY);
  await drag(0, -150);
  await page.waitForFunction((before) => scrollY > before + 50, before);
  await page.context().close();
});

test.each(["light", "dark"] as const)("axe finds nothing to object to, %s", async (colorScheme) => {
  for (const viewport of [
    { width: 1280, height: 800 },
    { width: 360, height: 780 },
  ]) {
    const { page } = await openPage(browser, service.url, { colorScheme, viewport });
    await page.getByRole("button", { name: "Choose a photo" }).waitFor();
    expect(await violations(page)).toEqual([]);

    await give(page, "drop", "SOURCES.md", "text/markdown");
    await alert(page).getByText("not an image").waitFor();
    await give(page, "drop", "scene.png");
    await page.getByText("Settings").click();
    await page.getByText("Settings").click();
    expect(await violations(page)).toEqual([]);

    if (viewport.width < 900) await page.getByText("Settings").click();
    await edit(page, EDIT, LONG_STEPS);
    await page.getByText(/^Step \d+ of/).waitFor();
    expect(await violations(page)).toEqual([]);
    await page.getByRole("button", { name: "Cancel", exact: true }).click();
    await page.getByRole("progressbar").waitFor({ state: "detached" });

    await page.getByLabel("Images").fill("2");
    await edit(page, EDIT, 4);
    await finished(page);
    await page.getByRole("button", { name: "Actual size" }).click();
    expect(await violations(page)).toEqual([]);
    await page.context().close();
  }
});
