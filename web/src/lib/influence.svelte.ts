/** What drove an answer: Δ log p of each of its tokens when a virtual token's value is zeroed. */
import { api, ApiError, type Body, type Schemas } from '../api/client';
import type { Column, ManyBody } from './comparison.svelte';
import { nameOf } from './targets';

export type GenerateBody = Body<'/generate'>;

/** The request that answers a column's text once more, with the influence of its virtual tokens. */
export function influenceRequest(column: Column, asked: ManyBody): GenerateBody {
  const temperature = asked.parameters?.temperature ?? null;
  return {
    inputs: asked.inputs,
    parameters: {
      details: true,
      influence: true,
      max_new_tokens: Math.max(1, column.count),
      // The same draws, where there are any.
      ...(temperature === null ? {} : { temperature, seed: column.details?.seed ?? undefined }),
    },
  };
}

export class InfluenceOf {
  found = $state.raw<Schemas['Influence'] | null>(null);
  error = $state.raw<ApiError | null>(null);
  readonly #abort = new AbortController();

  async load(column: Column, body: GenerateBody): Promise<void> {
    this.error = null;
    const task = column.version === null ? column.target : `${nameOf(column.target)}@${column.version}`;
    try {
      const reply = await api.post('/generate', { query: { task }, json: body, signal: this.#abort.signal });
      this.found = (reply.body as Schemas['GenerateReply']).details?.influence ?? null; // one text, one reply
      if (!this.found) this.error = new ApiError('The server measured no influence.', 0, '', 'Run the answer again.');
    } catch (error) {
      if (this.#abort.signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      this.error = error;
    }
  }

  leave(): void {
    this.#abort.abort();
  }
}
