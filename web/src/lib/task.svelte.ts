/** One task on its page: its versions and its ETag, and changes that nobody else's change may overwrite. */
import { api, ApiError, send, type Schemas } from '../api/client';
import { tasks, type TaskDetail } from './tasks.svelte';

export type Version = Schemas['VersionBody'];

export class TaskState {
  detail = $state.raw<TaskDetail | null>(null);
  versions = $state.raw<Version[]>([]);
  next = $state<number | null>(null);
  error = $state.raw<ApiError | null>(null);
  isBusy = $state(false);
  /** What the last change did, for the status line. */
  said = $state('');
  #etag = '';

  constructor(readonly name: string) {}

  get traffic(): Record<string, number> {
    if (this.detail?.traffic) return this.detail.traffic;
    return this.detail?.version ? { [this.detail.version]: 100 } : {};
  }

  async load(): Promise<void> {
    const path = { task: this.name };
    try {
      const [detail, versions] = await Promise.all([
        api.get('/prompts/{task}', { path }),
        api.get('/prompts/{task}/versions', { path }),
      ]);
      this.error = null;
      this.detail = detail.body;
      this.#etag = detail.etag ?? '';
      this.versions = versions.body.versions;
      this.next = versions.body.next ?? null;
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) {
        this.detail = null; // it was deleted: nothing of it is left to act on
        this.versions = [];
      }
      this.#report(error);
    }
  }

  async more(): Promise<void> {
    try {
      const query = { before: this.next ?? undefined };
      const { body } = await api.get('/prompts/{task}/versions', { path: { task: this.name }, query });
      this.versions = [...this.versions, ...body.versions];
      this.next = body.next ?? null;
    } catch (error) {
      this.#report(error);
    }
  }

  activate(version: number): Promise<void> {
    return this.#change(`v${version} is live`, 'post', '/activate', { version });
  }

  rollBack(): Promise<void> {
    return this.#change(() => `Rolled back: ${this.#standing()}`, 'post', '/rollback');
  }

  divide(shares: Record<string, number>): Promise<void> {
    return this.#change(() => `The traffic is divided: ${this.#standing()}`, 'put', '/traffic', shares);
  }

  /** What is live, in words. */
  #standing(): string {
    const shares = Object.entries(this.traffic).sort(([, a], [, b]) => b - a);
    if (shares.length === 1) return `v${shares[0]![0]} is live again`;
    return shares.map(([version, part]) => `v${version} ${part} %`).join(', ') || 'no version is live';
  }

  removeVersion(version: number): Promise<void> {
    return this.#change(`v${version} is deleted`, 'delete', `/versions/${version}`);
  }

  /** Delete the task with all its versions; whether that was done. */
  async remove(): Promise<boolean> {
    await this.#change('The task is deleted', 'delete', '', undefined, false);
    if (this.error) return false;
    await tasks.load(true);
    return true;
  }

  async download(version: number): Promise<void> {
    try {
      const reply = await send('get', '/prompts/{task}/versions/{version}/download', {
        path: { task: this.name, version },
      });
      const link = document.createElement('a');
      link.href = URL.createObjectURL(await reply.blob());
      link.download = `${this.name}-${version}.zip`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    } catch (error) {
      this.#report(error);
    }
  }

  /** Send a change with the ETag of what is on screen, so that it fails if somebody else was first. */
  async #change(
    said: string | (() => string),
    method: string,
    path: string,
    json?: unknown,
    reload = true,
  ): Promise<void> {
    if (this.isBusy) return;
    this.isBusy = true;
    this.said = '';
    this.error = null;
    try {
      await send(method, `/prompts/{task}${path}`, { path: { task: this.name }, json, ifMatch: this.#etag });
      if (reload) {
        await this.load();
        void tasks.load(true);
      }
      this.said = `${typeof said === 'string' ? said : said()}.`;
    } catch (error) {
      const found = error instanceof ApiError ? error : null;
      if (found?.status === 412) {
        await this.load(); // show what there is now; the person decides again
        if (!this.detail) return;
        this.error = new ApiError(
          `Somebody else changed ${this.name} in the meantime, so nothing was done.`,
          found.status,
          found.code,
          'The page shows the task as it is now: look, and do it again if you still want it.',
          found.requestId,
        );
      } else if (found?.status === 404) await this.load();
      else this.#report(error);
    } finally {
      this.isBusy = false;
    }
  }

  #report(error: unknown): void {
    if (!(error instanceof ApiError)) throw error;
    this.error = error;
  }
}

/** A value of a manifest as lines of text. */
function lines(value: unknown): string[] {
  if (value === undefined) return [];
  return (typeof value === 'string' ? value : JSON.stringify(value, null, 2)).split('\n');
}

export interface Change {
  name: string;
  before: string[];
  after: string[];
}

/** Identities and times differ always; they say nothing about what changed. */
const ALWAYS = ['digest', 'prefix_hash', 'created_at', 'task'];

/** The fields in which two manifests differ. */
export function changes(before: Record<string, unknown>, after: Record<string, unknown>): Change[] {
  const names = Object.keys({ ...before, ...after }).sort();
  return names
    .filter((name) => !ALWAYS.includes(name) && JSON.stringify(before[name]) !== JSON.stringify(after[name]))
    .map((name) => ({ name, before: lines(before[name]), after: lines(after[name]) }));
}
