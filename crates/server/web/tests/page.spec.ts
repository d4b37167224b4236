import type { Browser } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import { fixture, give, launch, openPage } from "./browser";
import { type RunningService, startService } from "./service";
import { alert, circle, comparison, EDIT, edit, edited, entries, finished, LONG_STEPS, slider, watch } from "./steps";

const STEPS = 100;

let service: RunningService;
let browser: Browser;

beforeAll(async () => {
  [service, browser] = await Promise.all([startService(), launch()]);
});

afterAll(async () => {
  await browser?.close();
  await service?.stop();
});

test("a dropped photo is edited in sight, compared, found again after a reload, and edited again", async () => {
  const { page, complaints } = await openPage(browser, service.url);
  await page.getByRole("button", { name: "Choose a photo" }).waitFor();
  await give(page, "drop", "scene.png");
  await page.getByAltText("The photo: scene.png").waitFor();
  const seen = await watch(page);
  await edit(page, EDIT, STEPS);
  await finished(page);
  expect(await page.title()).toBe("retouch");

  // Live: the steps, and a picture of them.
  const { said, values, previews } = await seen();
  expect(said.filter((text) => /^Step \d+ of 100$/.test(text)).length).toBeGreaterThan(2);
  expect(values).toEqual([...values].sort((a, b) => a - b));
  expect(values.length).toBeGreaterThan(2);
  expect(previews.length).toBeGreaterThan(2);
  for (const preview of previews) expect(preview).toMatch(/^data:image\/jpeg;base64,/);

  // The keyboard moves the line: all of it before, then all of it after.
  await slider(page).focus();
  await page.keyboard.press("ArrowRight");
  expect(await slider(page).getAttribute("aria-valuetext")).toBe("52 % before, 48 % after");
  await page.keyboard.press("End");
  expect(await slider(page).getAttribute("aria-valuenow")).toBe("100");
  expect(await circle(page)).toBe("red");
  await page.keyboard.press("Home");
  expect(await circle(page)).toBe("blue");

  // So does the pointer, and it takes the focus to the line.
  const box = (await comparison(page).boundingBox())!;
  await page.mouse.move(box.x + box.width * 0.25, box.y + 20);
  await page.mouse.down();
  expect(await slider(page).getAttribute("aria-valuenow")).toBe("25");
  await page.mouse.move(box.x + box.width * 0.75, box.y + box.height + 40);
  expect(await slider(page).getAttribute("aria-valuenow")).toBe("75");
  await page.mouse.up();
  await page.mouse.move(box.x, box.y);
  expect(await slider(page).getAttribute("aria-valuenow")).toBe("75");
  await page.keyboard.press("PageDown");
  expect(await slider(page).getAttribute("aria-valuenow")).toBe("65");

  // A reload loses nothing: not the picture, and not what is in the form.
  await page.reload();
  await slider(page).waitFor();
  await page.getByText("scene.png").waitFor();
  expect(await page.getByLabel("What to change").inputValue()).toBe(EDIT);
  expect(await page.getByLabel("Steps").inputValue()).toBe(String(STEPS));

  // From the history, in a tab that has not seen it.
  const other = await page.context().newPage();
  await other.goto(service.url);
  await other.getByRole("button", { name: "Choose a photo" }).waitFor();
  await entries(other).getByRole("link", { name: EDIT }).first().click();
  await slider(other).waitFor();
  await other.getByText("scene.png").waitFor();
  expect(await other.getByLabel("What to change").inputValue()).toBe(EDIT);
  await other.close();

  // The result is the next photo.
  await page.getByRole("button", { name: "Edit this result" }).click();
  await page.getByAltText(/^The photo: scene-edited-\d+\.png$/).waitFor();
  const count = await entries(page).count();
  await edit(page, "make it black and white", 4);
  await finished(page);
  expect(await entries(page).count()).toBe(count + 1);
  await slider(page).press("End");
  expect(await circle(page)).toBe("blue");

  expect(complaints).toEqual([]);
  await page.context().close();
});

test("a running job is followed after a reload, and can be cancelled", async () => {
  const { page, complaints } = await openPage(browser, service.url);
  await give(page, "paste", "scene.png");
  await edit(page, EDIT, LONG_STEPS);
  await page.getByText(`of ${LONG_STEPS}`).waitFor();

  // Also without its address.
  await page.goto(`${service.url}#`);
  await page.reload();
  await page.getByText(`of ${LONG_STEPS}`).waitFor();
  expect(await page.title()).toMatch(/^\d+ % · retouch$/);

  // What comes after it waits, and is told how long the queue is.
  await page.getByRole("button", { name: "Show the photo" }).waitFor();
  await page.getByLabel("Steps").fill("4");
  await page.getByRole("button", { name: "Edit the photo" }).click();
  await page.locator(".progress").getByText("Queued, next in line").waitFor();
  await page.getByRole("button", { name: "Cancel", exact: true }).click();
  await entries(page).first().getByText(/^cancelled/).waitFor();

  await entries(page).getByText(/^running/).click();
  await page.getByRole("button", { name: "Cancel", exact: true }).click();
  await page.getByRole("progressbar").waitFor({ state: "detached" });
  expect(await entries(page).getByText(/^cancelled/).count()).toBe(2);
  expect(await page.locator("p[role=status]").textContent()).toBe("Cancelled");
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("a stream of events that breaks is taken up again", async () => {
  const { page } = await openPage(browser, service.url);
  let streams = 0;
  await page.route("**/events", async (route) => {
    streams += 1;
    if (streams === 1) await route.abort();
    else if (streams === 2) await route.fulfill({ contentType: "text/event-stream", body: "event: job\ndata: {" });
    else await route.continue();
  });
  await give(page, "drop", "scene.png");
  await edit(page, EDIT, LONG_STEPS);
  await page.getByText(/^Step \d+ of 1000$/).waitFor();
  expect(streams).toBe(3);
  await page.getByRole("button", { name: "Cancel", exact: true }).click();
  await page.getByRole("progressbar").waitFor({ state: "detached" });
  expect(streams).toBe(3);
  expect(await alert(page).textContent()).toBe("");
  await page.context().close();
});

test("what was begun in the form stays when another job is looked at", async () => {
  const { page } = await edited(browser, service.url);
  await edit(page, "make it black and white");
  await entries(page).first().getByText("make it black and white").waitFor();
  await finished(page);
  await page.getByLabel("What to change").fill("make the square pink");
  const button = page.getByRole("button", { name: "Reuse settings" });
  await entries(page).nth(1).getByRole("link", { name: EDIT }).click();
  await page.locator(".entry.viewed").getByText(EDIT).waitFor();
  expect(await page.getByLabel("What to change").inputValue()).toBe("make the square pink");
  await button.click();
  await page.waitForFunction((prompt) => document.querySelector("textarea")?.value === prompt, EDIT);
  expect(await button.isDisabled()).toBe(true);

  // Also what is typed while the last is still being sent.
  await page.route("**/api/jobs", async (route) => {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    await route.continue();
  });
  await edit(page, "make it darker");
  await page.getByRole("button", { name: "Sending" }).waitFor();
  await page.getByLabel("What to change").fill("make the square pink");
  await page.locator(".entry.viewed").getByText("make it darker").waitFor();
  await entries(page).nth(1).getByRole("link").click();
  await page.locator(".entry:nth-child(2).viewed").waitFor();
  expect(await page.getByLabel("What to change").inputValue()).toBe("make the square pink");
  await page.context().close();
});

test("what a prompt holds is text", async () => {
  const prompt = `<img src=x onerror="document.title='run'"> <b>bold</b> & "quotes"`;
  const { page, complaints } = await edited(browser, service.url, prompt);
  await page.reload();
  await slider(page).waitFor();
  expect(await page.locator(".caption .prompt").textContent()).toBe(prompt);
  expect(await entries(page).first().locator(".prompt").textContent()).toBe(prompt);
  expect(await page.title()).toBe("retouch");
  expect(await page.locator("b").count()).toBe(0);
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("several results are looked at one by one, and each can be downloaded and its seed kept", async () => {
  const { page, complaints } = await openPage(browser, service.url);
  await page.getByLabel("Photo", { exact: true }).setInputFiles(fixture("scene.png"));
  await page.getByLabel("Images").fill("3");
  await page.getByLabel("Seed").fill("41");
  await page.getByLabel("File").selectOption("JPEG");
  await edit(page, EDIT);
  await finished(page);

  await page.getByAltText("Result 2, seed 42").click();
  await page.getByText(/seed 42/).waitFor();
  const [download] = await Promise.all([
    page.waitForEvent("download"),
    page.getByRole("link", { name: "Download" }).click(),
  ]);
  expect(download.suggestedFilename()).toBe("scene-edited-42.jpg");

  await page.getByRole("button", { name: "Keep this seed" }).click();
  expect(await page.getByLabel("Seed").inputValue()).toBe("42");
  await page.getByRole("button", { name: "Seed kept" }).waitFor();
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("the command line that is copied is the job's", async () => {
  const { page } = await edited(browser, service.url);
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await page.getByRole("button", { name: "Copy command" }).click();
  await page.getByRole("button", { name: "Copied" }).waitFor();
  const id = decodeURIComponent(new URL(page.url()).hash.slice(1));
  const job = await (await fetch(`${service.url}api/jobs/${id}`)).json();
  expect(await page.evaluate(() => navigator.clipboard.readText())).toBe(job.command);
  expect(job.command).toMatch(/^retouch edit /);
  await page.context().close();
});

test("a finished job is deleted on the second press, for good", async () => {
  const { page, complaints } = await edited(browser, service.url, "make the square green");
  const count = await entries(page).count();
  const remove = entries(page).first().getByRole("button");
  await remove.click();
  expect(await remove.getAttribute("aria-label")).toBe("Press again to delete: make the square green");
  expect(await entries(page).count()).toBe(count);
  await remove.click();
  await page.waitForFunction((count) => document.querySelectorAll(".entry").length === count - 1, count);
  expect(await page.evaluate(() => document.activeElement?.textContent)).toBe("History");
  await page.reload();
  await page.getByRole("button", { name: "Choose a photo" }).waitFor();
  await page.waitForFunction((count) => document.querySelectorAll(".entry").length === count - 1, count);
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("without a photo an image is made from words", async () => {
  const { page, complaints } = await openPage(browser, service.url);
  await page.getByText("Without a photo, the model makes an image from words alone.").waitFor();
  await page.getByLabel("What to show").fill("a red circle on a yellow background");
  await page.getByLabel("Size").selectOption("Exact, in pixels");
  await page.getByLabel("Width").fill("192");
  await page.getByLabel("Height").fill("128");
  await page.keyboard.press("Control+Enter");
  const image = page.locator(".frame").getByAltText("a red circle on a yellow background");
  await image.waitFor();
  expect(await image.evaluate((image: HTMLImageElement) => [image.naturalWidth, image.naturalHeight])).toEqual([192, 128]);
  expect(await slider(page).count()).toBe(0);
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("a photo in a format that browsers do not know is edited and compared like any other", async () => {
  const { page } = await openPage(browser, service.url);
  await give(page, "drop", "rgb.tiff", "image/tiff");
  await page.getByText("This browser cannot show “rgb.tiff”").waitFor();
  await edit(page, "make it darker");
  await finished(page);
  const before = page.getByAltText("Before");
  await page.waitForFunction((image) => (image as HTMLImageElement).naturalWidth > 0, await before.elementHandle());
  await page.context().close();
});

test("what cannot be taken is said in a sentence", async () => {
  const { page } = await openPage(browser, service.url);
  await page.getByRole("button", { name: "Choose a photo" }).waitFor();
  await give(page, "drop", "SOURCES.md", "text/markdown");
  await alert(page).getByText("“SOURCES.md” is not an image.").waitFor();

  // Named as an image, and none: this the service finds out, and the page shows its sentence.
  await give(page, "drop", "text.png");
  await page.getByText("This browser cannot show “text.png”").waitFor();
  const answer = page.waitForResponse((response) => response.request().method() === "POST");
  await edit(page, EDIT);
  const { error } = await (await answer).json();
  await alert(page).getByText(error.message, { exact: true }).waitFor();
  await page.getByRole("button", { name: "Close" }).click();
  expect(await alert(page).textContent()).toBe("");

  // A size that is none is not sent.
  await page.getByLabel("Size").selectOption("Exact, in pixels");
  await page.getByLabel("Width").fill("100");
  await page.getByRole("button", { name: "Edit the photo" }).click();
  expect(await page.getByLabel("Width").evaluate((field: HTMLInputElement) => field.matches(":focus:invalid"))).toBe(true);
  await page.context().close();
});
