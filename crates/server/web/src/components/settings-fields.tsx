import { useRef } from "preact/hooks";
import type { Service } from "../api/types";
import { EXACT, LIKE_THE_PHOTO, type Settings } from "../state/draft";
import { read, write } from "../state/storage";
import type { Draft } from "../state/use-draft";
import { NumberField } from "./number-field";

const OPEN = "retouch.settings-open";
const FORMATS = [
  ["png", "PNG"],
  ["jpeg", "JPEG"],
  ["webp", "WebP"],
] as const;
const RATIOS = ["1:1", "5:4", "4:3", "3:2", "16:9", "21:9", "4:5", "3:4", "2:3", "9:16", "9:21"];
// What the model makes is in tokens of 16 x 16 pixels.
const TOKEN_PIXELS = 16;

export function SettingsFields({ draft, service }: { draft: Draft; service: Service }) {
  const details = useRef<HTMLDetailsElement>(null);
  const { settings, set } = draft;
  const { defaults, limits } = service;
  const likeThePhoto = draft.source === null ? "The model's choice" : "Like the photo";
  const ratios = RATIOS.includes(settings.size) || !settings.size.includes(":") ? RATIOS : [settings.size, ...RATIOS];

  return (
    <details
      ref={details}
      class="settings"
      open={(read("local", OPEN) ?? (matchMedia("(min-width: 900px)").matches ? "yes" : "no")) === "yes"}
      onToggle={(event) => write("local", OPEN, event.currentTarget.open ? "yes" : "no")}
      onInvalidCapture={() => {
        // What is wrong must be seen to be put right.
        if (details.current) details.current.open = true;
      }}
    >
      <summary>
        Settings <span class="quiet">{summary(settings, service, likeThePhoto)}</span>
      </summary>
      <div class="fields">
        <label class="field wide">
          Size
          <select value={settings.size} onChange={(event) => set({ size: event.currentTarget.value })}>
            <option value={LIKE_THE_PHOTO}>{likeThePhoto}</option>
            <optgroup label="Shape, width to height">
              {ratios.map((ratio) => (
                <option key={ratio} value={ratio}>
                  {ratio}
                </option>
              ))}
            </optgroup>
            <option value={EXACT}>Exact, in pixels</option>
          </select>
        </label>
        {settings.size === EXACT && (
          <>
            <NumberField
              label="Width"
              min={TOKEN_PIXELS}
              step={TOKEN_PIXELS}
              required
              value={settings.width}
              change={(width) => set({ width })}
            />
            <NumberField
              label="Height"
              min={TOKEN_PIXELS}
              step={TOKEN_PIXELS}
              max={Math.floor(limits.max_pixels / Math.max(TOKEN_PIXELS, Number(settings.width)))}
              required
              value={settings.height}
              change={(height) => set({ height })}
            />
          </>
        )}
        <NumberField
          label="Steps"
          min={1}
          max={limits.max_steps}
          placeholder={String(defaults.steps)}
          value={settings.steps}
          change={(steps) => set({ steps })}
        />
        {defaults.guidance !== null && (
          <NumberField
            label="Guidance"
            min={0}
            step="any"
            placeholder={String(defaults.guidance)}
            value={settings.guidance}
            change={(guidance) => set({ guidance })}
          />
        )}
        <NumberField
          label="Images"
          min={1}
          max={limits.max_images}
          required
          value={settings.images}
          change={(images) => set({ images })}
        />
        <NumberField
          label="Seed"
          min={0}
          max={Number.MAX_SAFE_INTEGER}
          placeholder="random"
          value={settings.seed}
          change={(seed) => set({ seed })}
        />
        <label class="field">
          File
          <select
            value={settings.format}
            onChange={(event) => set({ format: FORMATS.find(([format]) => format === event.currentTarget.value)?.[0] ?? "png" })}
          >
            {FORMATS.map(([format, name]) => (
              <option key={format} value={format}>
                {name}
              </option>
            ))}
          </select>
        </label>
        <NumberField
          label="JPEG quality"
          min={1}
          max={100}
          placeholder="95"
          disabled={settings.format !== "jpeg"}
          value={settings.quality}
          change={(quality) => set({ quality })}
        />
        <label class="field wide">
          Avoid
          <input
            placeholder="nothing named; doubles the time"
            value={settings.avoid}
            onInput={(event) => set({ avoid: event.currentTarget.value })}
          />
        </label>
        <NumberField
          label="Avoidance"
          min={1}
          max={100}
          step="any"
          required
          disabled={settings.avoid.trim() === ""}
          value={settings.avoidance}
          change={(avoidance) => set({ avoidance })}
        />
        <NumberField
          label="Step cache"
          min={0}
          max={1}
          step="any"
          placeholder="off"
          value={settings.cache}
          change={(cache) => set({ cache })}
        />
      </div>
    </details>
  );
}

/** What is not as it is by default, for when the fields are folded away. */
function summary(settings: Settings, service: Service, likeThePhoto: string): string {
  const size = { [LIKE_THE_PHOTO]: likeThePhoto, [EXACT]: `${settings.width} × ${settings.height}` }[settings.size];
  return [
    size ?? settings.size,
    `${settings.steps || service.defaults.steps} steps`,
    settings.seed === "" ? "random seed" : `seed ${settings.seed}`,
  ].join(", ");
}
