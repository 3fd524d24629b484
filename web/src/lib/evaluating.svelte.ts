/** One evaluation while it is watched, and its result. */
import { send, type Schemas } from '../api/client';
import type { Result } from './evaluation';
import { WatchedJob } from './watched_job.svelte';

export type Evaluation = Schemas['EvaluationBody'];

export class Evaluating extends WatchedJob<Evaluation> {
  /** The result as Markdown, once it is asked for. */
  card = $state<string | null>(null);

  constructor(id: string) {
    super('/evaluations', id);
  }

  get result(): Result | null {
    return (this.job?.result ?? null) as unknown as Result | null;
  }

  async loadCard(): Promise<void> {
    await this.do(async () => {
      this.card = await (await send('get', '/evaluations/{job}/card', { path: { job: this.id } })).text();
    });
  }
}
