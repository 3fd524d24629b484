/** The key, the theme and the server's facts: what belongs to this tab. */
import type { components } from '../api/schema';

export type Theme = 'system' | 'light' | 'dark';

const KEY = 'prelude-key';
const THEME = 'prelude-theme';

/** Storage may be forbidden; then nothing is remembered. */
function stored(storage: 'sessionStorage' | 'localStorage', name: string, value?: string | null): string | null {
  try {
    const found = window[storage];
    if (value === undefined) return found.getItem(name);
    if (value === null) found.removeItem(name);
    else found.setItem(name, value);
  } catch {
    // nothing is remembered
  }
  return value ?? null;
}

function isTheme(value: string | null): value is Theme {
  return value === 'system' || value === 'light' || value === 'dark';
}

class Session {
  /** The API key: in memory, and in sessionStorage only if the user wants that; never in a cookie or an address. */
  key = $state(stored('sessionStorage', KEY) ?? '');
  /** Whether a request was refused for want of a key. */
  needsKey = $state(false);
  theme = $state<Theme>('system');
  /** GET /info; null until it is there. */
  info = $state.raw<components['schemas']['Info'] | null>(null);
  /** Counts up when the key changes: what was loaded with another key is stale. */
  generation = $state(0);

  constructor() {
    const theme = stored('localStorage', THEME);
    this.setTheme(isTheme(theme) ? theme : 'system');
  }

  setKey(key: string, remember: boolean): void {
    this.key = key.trim();
    this.needsKey = false;
    this.generation += 1;
    stored('sessionStorage', KEY, remember && this.key ? this.key : null);
  }

  setTheme(theme: Theme): void {
    this.theme = theme;
    document.documentElement.dataset.theme = theme;
    stored('localStorage', THEME, theme === 'system' ? null : theme);
  }
}

export const session = new Session();
