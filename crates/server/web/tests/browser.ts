import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { type Browser, type BrowserContextOptions, chromium, type Locator, type Page } from "playwright-core";

const ARGUMENTS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

export function launch(): Promise<Browser> {
  return chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGUMENTS });
}

export interface Opened {
  page: Page;
  /** Errors and warnings of its console, such as what the content security policy forbids. */
  complaints: string[];
}

export async function openPage(browser: Browser, url: string, options: BrowserContextOptions = {}): Promise<Opened> {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
  const page = await context.newPage();
  // The service computes on the same cores.
  page.setDefaultTimeout(60_000);
  const complaints: string[] = [];
  page.on("pageerror", (error) => complaints.push(error.message));
  page.on("console", (message) => {
    if (message.type() === "error" || message.type() === "warning") complaints.push(message.text());
  });
  await page.goto(url);
  return { page, complaints };
}

export function fixture(name: string): string {
  return fileURLToPath(new URL(`../../../../tests/fixtures/images/${name}`, import.meta.url));
}

/** Hands a file to the page as `drop` or `paste` does. */
export async function give(page: Page, how: "drop" | "paste", file: string, type = "image/png"): Promise<void> {
  await page.getByRole("main").waitFor();
  const bytes = (await readFile(fixture(file))).toString("base64");
  await page.evaluate(
    ({ how, file, type, bytes }) => {
      const transfer = new DataTransfer();
      const content = Uint8Array.from(atob(bytes), (char) => char.charCodeAt(0));
      transfer.items.add(new File([content], file, { type }));
      const event = (name: string) => new DragEvent(name, { dataTransfer: transfer, bubbles: true, cancelable: true });
      const target = document.body;
      if (how === "paste") {
        target.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }));
      } else {
        for (const name of ["dragenter", "dragover", "drop"]) target.dispatchEvent(event(name));
      }
    },
    { how, file, type, bytes },
  );
}

/** The colour `[red, green, blue]` that is seen at a place of an element, given by shares of its width and height. */
export async function colourAt(element: Locator, x: number, y: number): Promise<[number, number, number]> {
  const png = (await element.screenshot()).toString("base64");
  return element.page().evaluate(
    async ({ png, x, y }) => {
      const image = new Image();
      image.src = `data:image/png;base64,${png}`;
      await image.decode();
      const canvas = document.createElement("canvas");
      canvas.width = image.width;
      canvas.height = image.height;
      const context = canvas.getContext("2d");
      if (context === null) throw new Error("no canvas");
      context.drawImage(image, 0, 0);
      const [red = 0, green = 0, blue = 0] = context.getImageData(x * image.width, y * image.height, 1, 1).data;
      return [red, green, blue] as [number, number, number];
    },
    { png, x, y },
  );
}
