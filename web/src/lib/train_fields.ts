/** The options of a training job, as POST /training/jobs and `prelude train` take them. An empty one is the default. */
export interface Field {
  /** As in the job; `config.` before those of the hyperparameters. */
  name: string;
  /** The option of `prelude train`, where it is not the name with dashes. */
  option?: string;
  label: string;
  help: string;
  /** The default, as it is shown; a test compares it with the server's. */
  standard: string;
  kind: 'text' | 'long' | 'number' | 'choice' | 'check';
  choices?: readonly string[];
  min?: number;
  max?: number;
}

const number = (name: string, label: string, standard: string, help: string, min = 1, max?: number): Field => ({
  name: `config.${name}`,
  label,
  standard,
  help,
  kind: 'number',
  min,
  ...(max === undefined ? {} : { max }),
});
const choice = (name: string, label: string, choices: readonly string[], help: string): Field => ({
  name: `config.${name}`,
  label,
  standard: choices[0]!,
  help,
  kind: 'choice',
  choices,
});

export const MAIN: Field[] = [
  choice('method', 'Method', ['prompt_tuning', 'p_tuning', 'prefix_tuning'], 'Prefix tuning has more parameters.'),
  number('num_virtual_tokens', 'Virtual tokens', '20', 'Learned vectors, usually 20 to 100.'),
  number('steps', 'Steps', '600', 'Optimiser steps.'),
  number('batch_size', 'Batch size', '16', 'Rows of a step.', 1, 4096),
  { ...number('learning_rate', 'Learning rate', 'auto', 'The peak; auto tries a few.'), option: 'lr', kind: 'text' },
];

export const MORE: Field[] = [
  {
    name: 'input_template',
    label: 'Input template',
    help: 'What the model reads; {input} is the row’s input, \\n a line break.',
    standard: '{input}\\n',
    kind: 'text',
  },
  { name: 'description', label: 'Description', help: 'One line, shown in lists.', standard: '', kind: 'text' },
  { name: 'licence', label: 'Licence', help: 'Of the rows; kept in the manifest.', standard: '', kind: 'text' },
  {
    name: 'system_message',
    label: 'System messages',
    help: 'What the task does with those of chats; “template” needs {system} in the template.',
    standard: 'ignore',
    kind: 'choice',
    choices: ['ignore', 'refuse', 'template'],
  },
  number('evaluations', 'Evaluations', '10', 'On the validation rows; the best state is kept.'),
  number('patience', 'Patience', '', 'Stop after this many evaluations without improvement.'),
  number('seed', 'Seed', '0', 'The same seed trains the same soft prompt.', 0),
  choice('optimizer', 'Optimiser', ['adamw', 'adafactor'], ''),
  choice(
    'init',
    'Initial values',
    ['auto', 'labels', 'vocab', 'text', 'soft_prompt', 'teacher', 'random'],
    'Auto takes the labels, if there are any, otherwise words of the vocabulary.',
  ),
];

export const STARTS: Record<string, Field> = {
  text: {
    name: 'config.init_text',
    label: 'Text to begin with',
    help: 'Its tokens are the initial values.',
    standard: '',
    kind: 'text',
  },
  soft_prompt: {
    name: 'config.init_from',
    label: 'Soft prompt to begin with',
    help: 'A task of this server, or task@n.',
    standard: '',
    kind: 'text',
  },
};

export const TEACHER: Field[] = [
  {
    name: 'config.teacher_template',
    option: 'teacher',
    label: 'Teacher’s text',
    help: 'A long text with {input} in it. The soft prompt learns to have its effect; rows need no targets.',
    standard: '',
    kind: 'long',
  },
  {
    name: 'config.teacher_chat',
    label: 'Send it as a user message',
    help: '',
    standard: '',
    kind: 'check',
  },
  {
    name: 'config.labels',
    option: 'label',
    label: 'Its labels, one a line',
    help: 'Learn how likely the teacher finds each, instead of its answers.',
    standard: '',
    kind: 'long',
  },
  {
    ...number('max_new_tokens', 'Tokens of an answer', '64', 'At most, of the teacher.', 1, 4096),
    name: 'max_new_tokens',
  },
];

export type Values = Record<string, string>;
/** Stage the result, make it live, or make it live if it is right on this share of the validation rows. */
export type Activate = 'stage' | 'live' | 'bound';

/** With fewer rows than this a search for the learning rate costs about as much as the training itself. */
const FEW_ROWS = 100;
/** The middle one of the learning rates that the search would try. */
const LEARNING_RATES: Record<string, string> = { prompt_tuning: '0.02', p_tuning: '0.001', prefix_tuning: '0.008' };

/** What the page sets for few rows, unless a person sets something else: each row is read 16 times or more. */
export function forFewRows(rows: number, method: string): Values {
  if (!rows || rows >= FEW_ROWS) return {};
  return {
    'config.steps': String(Math.max(40, 2 * rows)),
    'config.batch_size': '8',
    'config.learning_rate': LEARNING_RATES[method || 'prompt_tuning']!,
  };
}

/** What a person has set. */
export const typed = (values: Values): Values =>
  Object.fromEntries(Object.entries(values).filter(([, value]) => value.trim()));

const ALL: Field[] = [...MAIN, ...MORE, ...Object.values(STARTS), ...TEACHER];
const unescaped = (text: string): string => text.replaceAll('\\n', '\n').replaceAll('\\t', '\t');

function valueOf({ name, kind }: Field, text: string): unknown {
  if (kind === 'number') return Number(text);
  if (kind === 'check') return true;
  if (name === 'config.labels') return text.split('\n').flatMap((line) => line.trim() || []);
  if (name === 'config.learning_rate') return text === 'auto' || Number.isNaN(Number(text)) ? text : Number(text);
  return name === 'input_template' ? unescaped(text) : text;
}

/** The fields that are set and count: what belongs to an unchosen start or to no teacher is left out. */
export function given(values: Values): Field[] {
  const start = STARTS[values['config.init'] ?? ''];
  const hasTeacher = Boolean(values['config.teacher_template']?.trim());
  return ALL.filter((field) => {
    if (Object.values(STARTS).includes(field) && field !== start) return false;
    if (TEACHER.includes(field) && !hasTeacher) return false;
    return Boolean(values[field.name]?.trim());
  });
}

/** The body of POST /training/jobs. */
export function specOf(task: string, values: Values, activate: Activate, bound: number): Record<string, unknown> {
  const config: Record<string, unknown> = {};
  const spec: Record<string, unknown> = { task };
  for (const field of given(values)) {
    const [name, of] = field.name.startsWith('config.') ? [field.name.slice(7), config] : [field.name, spec];
    of[name] = valueOf(field, values[field.name]!);
  }
  if (Object.keys(config).length) spec.config = config;
  if (activate === 'live') spec.activate = true;
  if (activate === 'bound') spec.activate = { metric: 'validation_exact_match', at_least: bound };
  return spec;
}

/** The same as a command, without its address. */
export function commandOf(
  task: string,
  values: Values,
  activate: Activate,
  bound: number,
  data: string,
  validation: string | null,
  shell: (text: string) => string,
): string {
  const options = given(values).flatMap((field) => {
    const name = `--${field.option ?? field.name.replace('config.', '').replaceAll('_', '-')}`;
    const text = values[field.name]!;
    if (field.name === 'max_new_tokens') return []; // the command has no such option
    if (field.kind === 'check') return [name];
    if (field.option === 'teacher') return [`${name} teacher.txt`];
    if (field.option === 'label') return (valueOf(field, text) as string[]).map((label) => `${name} ${shell(label)}`);
    return [`${name} ${shell(text)}`];
  });
  const goes = { stage: [], live: ['--activate'], bound: [`--activate-at-least ${bound}`] }[activate];
  const files = [`--data ${shell(data)}`, ...(validation ? [`--validation ${shell(validation)}`] : [])];
  return [`prelude train ${shell(task)}`, ...files, ...options, ...goes].join(' ');
}
