import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { brotliCompressSync, gzipSync } from 'node:zlib';
import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig, type Plugin } from 'vite';

const OUT = '../server/web/dist';

/** Leaves a .br and a .gz beside each file, so that the server compresses nothing. */
function precompress(): Plugin {
  return {
    name: 'precompress',
    apply: 'build',
    closeBundle() {
      for (const entry of readdirSync(OUT, { recursive: true, withFileTypes: true })) {
        if (!/\.(js|css|html|svg)$/.test(entry.name)) continue;
        const path = join(entry.parentPath, entry.name);
        const content = readFileSync(path);
        writeFileSync(`${path}.br`, brotliCompressSync(content));
        writeFileSync(`${path}.gz`, gzipSync(content, { level: 9 }));
      }
    },
  };
}

export default defineConfig({
  // Relative addresses, so that a proxy may put the server below a path.
  base: './',
  plugins: [svelte(), precompress()],
  build: {
    outDir: OUT,
    emptyOutDir: true,
    assetsDir: 'playground', // ASSETS in server/api/playground.py
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: 'es2022',
    cssTarget: ['chrome123', 'firefox121', 'safari17.5'],
    reportCompressedSize: false,
  },
  server: {
    // `npm run dev` beside `prelude serve`: everything but the page's own files is the server's.
    proxy: Object.fromEntries(
      [
        '/generate',
        '/prompts',
        '/training',
        '/evaluations',
        '/interpretations',
        '/info',
        '/metrics',
        '/v1',
        '/ready',
        '/tokenize',
      ].map((path) => [path, 'http://127.0.0.1:8000']),
    ),
  },
  test: { include: ['src/**/*.test.ts'] },
} as Parameters<typeof defineConfig>[0]);
