// The form, and the run that it starts.
const form = $('form'), field = name => form.elements[name], body = document.body;
const EXAMPLES = {
  shapes: ['a big red ball moving left at night', 'a small yellow star bouncing over the sea', 'a big green square moving up in a meadow'],
  other: ['a cat stretches on a sunlit sofa', 'waves roll onto a rocky beach at dusk', 'a paper boat drifts down a rainy street'],
};
let offers = null, run = null, clips = [], shown = [], known = {};

const modelOf = side => offers?.data.find(one => one.id === field(side + 'model').value);
const said = (input, text) => { const out = $('output', input.parentElement); if (out) out.textContent = text; };

// The settings that either side of a comparison has of its own.
function own(side) {
  const range = (name, text, attributes) => h('label', {}, text + ' ', h('output'), h('input', { name: side + name, type: 'range', ...attributes }), h('small'));
  return [h('div', { class: 'pair' },
    range('num_inference_steps', 'Steps', { min: 1, step: 1 }), range('guidance_scale', 'Guidance', { min: 1, max: 10, step: 0.5 })),
    h('label', { class: side + 'decoder' }, 'Decoder ', h('select', { name: side + 'decoder' }))];
}
$('.own').replaceChildren(...own(''));
$('.versus').append(h('label', {}, 'Model ', h('select', { name: 'b_model' })), ...own('b_'));

const options = (select, pairs, value) => {
  select.replaceChildren(...pairs.map(([key, text]) => h('option', { value: key }, text)));
  if (pairs.some(([key]) => key === value)) select.value = value;
};

// Sizes of about as many pixels as the model's own, in usual shapes, on its grid.
function sizes({ defaults, stride }) {
  const whole = (px, step) => Math.max(step, Math.round(px / step) * step);
  const area = defaults.width * defaults.height, found = new Map();
  for (const [ratio, text] of [[defaults.width / defaults.height, 'native'], [16 / 9, 'wide'], [4 / 3, '4:3'], [1, 'square'], [3 / 4, '3:4'], [9 / 16, 'tall']]) {
    const width = whole(Math.sqrt(area * ratio), stride.width), height = whole(Math.sqrt(area / ratio), stride.height);
    if (!found.has(`${width}x${height}`)) found.set(`${width}x${height}`, `${width}×${height} ${text}`);
  }
  return [...found, ['custom', 'Another size']];
}

function fit(side) {  // limits and fixed values of the model that is chosen
  const model = modelOf(side);
  if (!model?.defaults) return;
  const { defaults, stride, is_distilled: fixed } = model, { limits } = offers;
  const steps = field(side + 'num_inference_steps'), guidance = field(side + 'guidance_scale');
  steps.max = limits.num_inference_steps; steps.value = defaults.num_inference_steps; steps.disabled = fixed;
  guidance.value = defaults.guidance_scale;
  $('small', steps.parentElement).textContent = fixed ? 'Fixed: distilled for them' : '';
  $('small', guidance.parentElement).textContent = fixed ? `Distilled at ${defaults.guidance_scale}` : '1 is off';
  options(field(side + 'decoder'), [['', 'The VAE’s own'], ...model.decoder.map(name => [name, name === 'tiny' ? 'Small and fast (tiny)' : name])]);
  $('.' + side + 'decoder').hidden = !model.decoder.length;
  if (side) return tell();
  options(field('size'), sizes(model));
  for (const name of ['width', 'height']) Object.assign(field(name), { step: stride[name], min: stride[name], max: limits[name], value: defaults[name] });
  const frames = field('num_frames'), most = Math.min(limits.num_frames, 2 * defaults.num_frames - 1);
  Object.assign(frames, { min: 1, step: stride.num_frames, max: most, value: defaults.num_frames });
  field('negative_prompt').placeholder = defaults.negative_prompt || 'What the clip does not show';
  const bundled = offers.bundled.includes(model.id), clip = `${defaults.width}×${defaults.height}, ${(defaults.num_frames / defaults.fps).toFixed(0)} s`;
  $('.about').textContent = bundled ? `A tiny model of coloured shapes; ${clip}. ${fixed ? `Distilled to ${defaults.num_inference_steps} steps.` : 'Takes any number of steps.'}` : model.notes || `${model.title || model.id}; ${clip}`;
  $('.examples').replaceChildren(...EXAMPLES[bundled ? 'shapes' : 'other'].map(text =>
    h('button', { type: 'button', class: 'chip', onclick: () => { field('prompt').value = text; tell(); field('prompt').focus(); } }, text)));
  tell();
}

function tell() {  // what the form says of itself, and whether it can act
  const model = modelOf(''), fps = model?.defaults?.fps ?? 16, frames = Number(field('num_frames').value);
  said(field('num_frames'), `${(frames / fps).toFixed(1)} s, ${frames} frames`);
  for (const name of ['num_inference_steps', 'guidance_scale', 'b_num_inference_steps', 'b_guidance_scale', 'strength']) said(field(name), field(name).value);
  const unused = Number(field('guidance_scale').value) === 1;
  field('negative_prompt').disabled = unused;
  $('small', field('negative_prompt').parentElement).textContent = unused ? 'Counts only with guidance above 1' : '';
  $('.custom').hidden = field('size').value !== 'custom';
  $('.versus').hidden = !field('compare').checked;
  $('.versus').disabled = !field('compare').checked;
  const can = offers?.data && !run && field('prompt').value.trim();
  $('.primary').disabled = !can;
  $('.primary').textContent = field('compare').checked ? 'Generate both' : 'Generate';
  $('.stop').disabled = !run || run.stopping;
}

function settings(side) {
  const model = modelOf(side), value = name => field(name).value, found = { model: value(side + 'model'), prompt: value('prompt'), seed: value('seed').trim() };
  const pick = (name, at) => { if (!isDefaultOf(at, name, model)) found[name] = Number(value(at)); };
  pick('num_inference_steps', side + 'num_inference_steps');
  pick('guidance_scale', side + 'guidance_scale');
  pick('num_frames', 'num_frames');
  if (value('size') === 'custom') for (const name of ['width', 'height']) pick(name, name);
  else if (value('size')) [found.width, found.height] = value('size').split('x').map(Number);
  if (found.width === model?.defaults?.width && found.height === model?.defaults?.height) { delete found.width; delete found.height; }
  if (value('negative_prompt').trim() && !field('negative_prompt').disabled) found.negative_prompt = value('negative_prompt');
  if (value('lora')) found.lora = [{ path: value('lora'), strength: Number(value('strength')) }];
  return { ...found, decoder: value(side + 'decoder'), slo_class: value('slo_class') };
}
const isDefaultOf = (at, name, model) => field(at).value === '' || Number(field(at).value) === model?.defaults?.[name];
