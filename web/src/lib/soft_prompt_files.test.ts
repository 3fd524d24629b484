import { describe, expect, it } from 'vitest';
import { softPromptsIn, taskOf } from './soft_prompt_files';

const dropped = (...paths: string[]) => paths.map((path) => ({ path, file: new File([], path.split('/').at(-1)!) }));
const shown = (...paths: string[]) =>
  softPromptsIn(dropped(...paths)).map(({ name, files }) => [name, ...files.map((file) => file.name)]);

describe('the soft prompts among dropped files', () => {
  it('are folders with PEFT files, of which the others stay here', () => {
    expect(
      shown('run/a/adapter_config.json', 'run/a/adapter_model.safetensors', 'run/a/optimizer.pt', 'run/README.md'),
    ).toEqual([['a', 'adapter_config.json', 'adapter_model.safetensors']]);
  });
  it('are loose files and zips', () => {
    expect(shown('adapter_model.safetensors', 'manifest.json', 'Mood.ZIP')).toEqual([
      ['', 'adapter_model.safetensors', 'manifest.json'],
      ['Mood', 'Mood.ZIP'],
    ]);
  });
  it('are sent as a pickle only where there is nothing else', () => {
    expect(shown('b/adapter_config.json', 'b/adapter_model.bin')).toEqual([
      ['b', 'adapter_config.json', 'adapter_model.bin'],
    ]);
    expect(shown('b/adapter_model.safetensors', 'b/adapter_model.bin')).toEqual([['b', 'adapter_model.safetensors']]);
  });
  it('are none among other files', () => {
    expect(shown('manifest.json', 'x/README.md', '<img src=x>.json')).toEqual([]);
  });
});

describe('the task of a name', () => {
  const tasks = new Set(['mood', 'top-5']);
  it('is the folder in lower case, or the task that a download is of', () => {
    expect(taskOf('Mood', tasks)).toBe('mood');
    expect(taskOf('mood-12', tasks)).toBe('mood');
    expect(taskOf('top-5', tasks)).toBe('top-5');
    expect(taskOf('gpt-2', tasks)).toBe('gpt-2');
  });
  it('is empty for what cannot be one', () => {
    expect(taskOf('My model', tasks)).toBe('');
    expect(taskOf('<b>', tasks)).toBe('');
    expect(taskOf('x'.repeat(65), tasks)).toBe('');
  });
});
