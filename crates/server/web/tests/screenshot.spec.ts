import { fileURLToPath } from "node:url";
import { test } from "vitest";
import { give, launch, openPage } from "./browser";
import { startService } from "./service";
import { comparison, edit, finished } from "./steps";

// For the history.
const EARLIER = [
  ["astronaut.jpg", "make it warmer"],
  ["coffee.jpg", "invert the colours"],
  ["chelsea.jpg", "make it black and white"],
] as const;

test.runIf(process.env.SCREENSHOT)("the README's picture", async () => {
  const service = await startService();
  const browser = await launch();
  try {
    const { page } = await openPage(browser, service.url, { reducedMotion: "reduce" });
    page.setDefaultTimeout(200_000);
    for (const [photo, prompt] of EARLIER) {
      await give(page, "drop", photo, "image/jpeg");
      await edit(page, prompt);
      await page.locator(".entry.viewed").getByText(prompt).waitFor();
      await finished(page);
    }
    await give(page, "drop", "scene.png");
    await page.getByLabel("Seed").fill("1");
    await page.getByLabel("Images").fill("2");
    await edit(page, "make the circle blue");
    await page.locator(".entry.viewed").getByText("make the circle blue").waitFor();
    await finished(page);
    // Through the middle of the circle.
    const box = (await comparison(page).boundingBox())!;
    await page.mouse.click(box.x + 0.31 * box.width, box.y + 0.9 * box.height);
    await page.mouse.move(0, 0);
    await page.screenshot({ path: fileURLToPath(new URL("../screenshot.png", import.meta.url)) });
  } finally {
    await browser.close();
    await service.stop();
  }
});
