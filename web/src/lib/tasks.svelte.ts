/** The server's tasks, which several views share: loaded once per key, page by page, and again when asked. */
import { api, ApiError, type Schemas } from '../api/client';
import { hashOf } from './router.svelte';
import { session } from './session.svelte';

export type Task = Schemas['PromptSummary'];
export type TaskDetail = Schemas['PromptDetail'];

class Tasks {
  all = $state.raw<Task[]>([]);
  isLoaded = $state(false);
  error = $state.raw<ApiError | null>(null);
  #details = new Map<string, Promise<TaskDetail | null>>();
  #loading: Promise<void> | null = null;
  #generation = -1;

  /** Load the list unless it is there; `again` loads it anyway. */
  load(again = false): Promise<void> {
    if (this.#generation !== session.generation || again) {
      this.#loading = null;
      this.#details.clear();
    }
    this.#generation = session.generation;
    this.#loading ??= this.#load(session.generation);
    return this.#loading;
  }

  /** A task's versions and manifest; null if there is no such task for this key. */
  detail(name: string): Promise<TaskDetail | null> {
    const found =
      this.#details.get(name) ??
      api.get('/prompts/{task}', { path: { task: name } }).then(
        ({ body }) => body,
        () => {
          this.#details.delete(name); // it may be there the next time, as may the server
          return null;
        },
      );
    this.#details.set(name, found);
    return found;
  }

  async #load(generation: number): Promise<void> {
    const found: Task[] = [];
    this.error = null;
    try {
      for (let after: string | undefined; ;) {
        const { body } = await api.get('/prompts', { query: { limit: 1000, after } });
        if (generation !== session.generation) return;
        found.push(...body.prompts);
        if (!body.next) break;
        after = body.next;
        if (!this.isLoaded) this.all = [...found];
      }
      this.all = found;
      this.isLoaded = true;
    } catch (error) {
      this.#loading = null;
      if (error instanceof ApiError) this.error = error;
      else throw error;
    }
  }
}

export const tasks = new Tasks();

/** The address of Compare with a task, where a version of it is live, some of its versions, and the frozen model. */
export function comparedAt(name: string, versions: number[], isLive: boolean): string {
  const targets = [...(isLive ? [name] : []), ...versions.map((version) => `${name}@${version}`), ''];
  return hashOf('compare', [], new URLSearchParams(targets.map((one) => ['with', one])));
}
