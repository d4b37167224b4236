import { defineConfig } from "vitest/config";

// Names without hashes: the built files are committed, and the program that embeds them names them.
const assets = "assets";

export default defineConfig({
  build: {
    target: "es2022",
    // The page has one script, which nothing preloads.
    modulePreload: { polyfill: false },
    rolldownOptions: {
      output: {
        entryFileNames: `${assets}/[name].js`,
        chunkFileNames: `${assets}/[name].js`,
        assetFileNames: `${assets}/[name][extname]`,
      },
    },
  },
  // `npm run dev` shows the sources as they are being changed, with the API of a service on its usual port.
  server: { proxy: { "/api": "http://127.0.0.1:8090" } },
  test: { testTimeout: 300_000, hookTimeout: 120_000, fileParallelism: false },
});
