import { untrack } from 'svelte';

/** The address after #: a view, its name and its state, such as `#/tasks/sms_spam?from=1`. The key is never in it. */
export interface Place {
  view: string;
  rest: string[];
  query: URLSearchParams;
}

export function placeOf(hash: string): Place {
  const [path = '', query = ''] = hash.replace(/^#\/?/, '').split(/\?(.*)/s);
  const [view = '', ...rest] = path.split('/').map(decoded);
  return { view: view || 'compare', rest, query: new URLSearchParams(query) };
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export function hashOf(view: string, rest: string[] = [], query: URLSearchParams = new URLSearchParams()): string {
  const path = [view, ...rest].map(encodeURIComponent).join('/');
  return `#/${path}${query.size ? `?${query}` : ''}`;
}

class Router {
  place = $state.raw(placeOf(location.hash));

  #known = location.hash;

  constructor() {
    window.addEventListener('hashchange', () => {
      this.#known = location.hash;
      this.place = placeOf(location.hash);
    });
  }

  go(view: string, ...rest: string[]): void {
    location.hash = hashOf(view, rest);
  }

  /**
   * Write a view's state into the address without a new entry of the history. Where somebody has just gone elsewhere,
   * which the browser reports a moment later, that stays.
   */
  remember(query: URLSearchParams): void {
    if (location.hash !== this.#known) return;
    const { view, rest } = untrack(() => this.place);
    history.replaceState(null, '', hashOf(view, rest, query));
    this.#known = location.hash;
  }
}

export const router = new Router();
