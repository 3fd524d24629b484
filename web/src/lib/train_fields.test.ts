import { describe, expect, it } from 'vitest';
import { commandOf, forFewRows, specOf, typed } from './train_fields';

const shell = (text: string) => `'${text}'`;

describe('a training job', () => {
  it('has only what was set', () => {
    expect(specOf('mood', {}, 'stage', 0.9)).toEqual({ task: 'mood' });
    const values = {
      'config.steps': '5',
      'config.learning_rate': '0.02',
      input_template: '{input}\\n',
      'config.seed': ' ',
    };
    expect(specOf('mood', values, 'bound', 0.9)).toEqual({
      task: 'mood',
      config: { steps: 5, learning_rate: 0.02 },
      input_template: '{input}\n',
      activate: { metric: 'validation_exact_match', at_least: 0.9 },
    });
  });
  it('leaves out what belongs to another start or to no teacher', () => {
    const values = {
      'config.init': 'text',
      'config.init_text': 'Mood:',
      'config.init_from': 'a',
      'config.labels': 'x\ny',
    };
    expect(specOf('mood', values, 'live', 0)).toEqual({
      task: 'mood',
      config: { init: 'text', init_text: 'Mood:' },
      activate: true,
    });
    const taught = {
      'config.teacher_template': 'Say: {input}',
      'config.teacher_chat': 'on',
      'config.labels': ' x \n\ny\n',
    };
    expect(specOf('mood', taught, 'stage', 0).config).toEqual({
      teacher_template: 'Say: {input}',
      teacher_chat: true,
      labels: ['x', 'y'],
    });
  });
  it('is a command', () => {
    const values = { 'config.num_virtual_tokens': '8', 'config.learning_rate': '0.1', 'config.labels': 'x' };
    expect(commandOf('mood', values, 'bound', 0.5, 'rows.jsonl', null, shell)).toBe(
      "prelude train 'mood' --data 'rows.jsonl' --num-virtual-tokens '8' --lr '0.1' --activate-at-least 0.5",
    );
  });
});

describe('few rows', () => {
  it('are read often enough in a short run, at a fixed learning rate of the method', () => {
    expect(forFewRows(20, '')).toEqual({
      'config.steps': '40',
      'config.batch_size': '8',
      'config.learning_rate': '0.02',
    });
    expect(forFewRows(60, 'prefix_tuning')).toMatchObject({ 'config.steps': '120', 'config.learning_rate': '0.008' });
    expect(forFewRows(0, '')).toEqual({});
    expect(forFewRows(100, '')).toEqual({});
  });
  it('leave what a person has typed, and nothing that is blank', () => {
    const all = { ...forFewRows(20, ''), ...typed({ 'config.steps': '5', 'config.learning_rate': ' ' }) };
    expect(specOf('mood', all, 'stage', 0).config).toEqual({ steps: 5, batch_size: 8, learning_rate: 0.02 });
  });
});
