import { expect, test } from "vitest";
import { violations } from "./axe";
import { give, launch, openPage } from "./browser";
import { startService } from "./service";
import { circle, EDIT, edit, finished, slider, watch } from "./steps";

const KEY = "open-sesame-0123456789";

test("a service with keys is asked with the key that is typed, kept until the tab is closed", async () => {
  const service = await startService("--api-key", KEY);
  const browser = await launch();
  try {
    const { page } = await openPage(browser, service.url);
    const field = page.getByLabel("Key", { exact: true });
    await field.fill("wrong");
    await page.getByRole("button", { name: "Continue" }).click();
    await page.getByText("The service did not accept this key.").waitFor();
    expect(await violations(page)).toEqual([]);
    await field.fill(KEY);
    await page.keyboard.press("Enter");
    await page.getByText("Your edits will be kept here.").waitFor();
    await give(page, "drop", "scene.png");
    const seen = await watch(page);
    await edit(page, EDIT, 100);
    await finished(page);
    expect((await seen()).said.filter((text) => /^Step \d+ of 100$/.test(text)).length).toBeGreaterThan(2);
    await slider(page).press("Home");
    expect(await circle(page)).toBe("blue");

    await page.reload();
    await slider(page).waitFor();
    const { page: later } = await openPage(browser, service.url);
    await later.getByRole("heading", { name: "This service asks for a key" }).waitFor();
    await later.context().close();
    await page.context().close();
  } finally {
    await browser.close();
    await service.stop();
  }
});
