/** Experiments with one task: past ones, and the one that is open, which is watched. */
import { api, type ApiError, type Schemas } from '../api/client';
import { isOver } from './job_events';
import { WatchedJob } from './watched_job.svelte';
import { Work } from './work.svelte';

export type Experiment = Schemas['ExperimentBody'];

export class Experiments extends Work {
  #listed = $state.raw<Experiment[]>([]);
  #watched = $state.raw<WatchedJob<Experiment> | null>(null);

  constructor(readonly task: string) {
    super();
  }

  /** The open one, with its result once it is done. */
  get open(): Experiment | null {
    return this.#watched?.job ?? null;
  }

  get all(): Experiment[] {
    const { open } = this;
    if (!open) return this.#listed;
    return [...this.#listed.filter(({ id }) => id !== open.id), open].sort((a, b) =>
      b.created_at.localeCompare(a.created_at),
    );
  }

  get isRunning(): boolean {
    return this.open !== null && !isOver(this.open.state);
  }

  /** What went wrong with watching the open one. */
  get lost(): ApiError | null {
    return this.#watched?.error ?? null;
  }

  /** Load past experiments and open the newest that is done or still runs. */
  async load(version: number | null): Promise<void> {
    this.error = null;
    try {
      const { body } = await api.get('/interpretations', {});
      this.#listed = body.interpretations.filter(({ task }) => task === this.task);
      const fitting = this.#listed.filter((one) => version === null || one.version === version);
      const found = fitting.find(({ state }) => state === 'done' || !isOver(state));
      if (found) this.show(found.id);
    } catch (error) {
      this.report(error);
    }
  }

  /** Open one: its result, or its progress until its end. */
  show(id: string): void {
    this.#watched?.leave();
    this.#listed = this.all;
    this.#watched = new WatchedJob<Experiment>('/interpretations', id);
    void this.again();
  }

  async again(): Promise<void> {
    await this.#watched?.watch();
  }

  async start(form: FormData): Promise<void> {
    await this.do(async () => {
      const path = { task: this.task };
      this.show((await api.post('/prompts/{task}/interpretation', { path, form })).body.id);
    });
  }

  async cancel(): Promise<void> {
    await this.#watched?.cancel();
  }

  /** Stop watching; the job itself continues. */
  override leave(): void {
    this.#watched?.leave();
    super.leave();
  }
}
