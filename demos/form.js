// The form: its choices, limits and fixed values come from the server's models.
const form = $('form'), field = name => form.elements[name];
const EXAMPLES = {
  shapes: ['a big red ball moving left at night', 'a small yellow star bouncing over the sea', 'a big green square moving up in a meadow'],
  other: ['a cat stretches on a sunlit sofa', 'waves roll onto a rocky beach at dusk', 'a paper boat drifts down a rainy street'],
};
const RATIOS = [[1, ''], [16 / 9, ' wide'], [4 / 3, ' 4:3'], [1, ' square'], [3 / 4, ' 3:4'], [9 / 16, ' tall']];
let offers = null;

const modelOf = side => offers?.data.find(one => one.id === field(side + 'model').value);

// The settings that each side of a comparison has of its own.
function own(side) {
  const range = (name, text, attributes) =>
    h('label', {}, text, h('span', { class: 'value' }), h('input', { name: side + name, type: 'range', ...attributes }), h('small'));
  return [h('div', { class: 'pair' }, range('num_inference_steps', 'Steps', { min: 1, step: 1 }),
    range('guidance_scale', 'Guidance', { min: 1, max: 10, step: 0.5 })),
  h('label', {}, 'Decoder ', h('select', { name: side + 'decoder' }))];
}
$('.own').append(...own(''));
$('.versus').append(h('label', {}, 'Model ', h('select', { name: 'b_model' })), ...own('b_'));

function options(name, pairs) {
  field(name).replaceChildren(...pairs.map(([value, text]) => h('option', { value }, text)));
  field(name).closest('label').hidden = pairs.length < 2 && !name.endsWith('model');
}

// Usual shapes of the model's own number of pixels, of half and of twice as many, on its grid.
function sizes({ defaults, stride }, limits) {
  const whole = (px, step) => Math.max(step, Math.round(px / step) * step), found = new Map();
  for (const scale of [1, 0.5, 2])
    for (const [ratio, text] of RATIOS) {
      const is = text === '' ? defaults.width / defaults.height : ratio, area = scale * defaults.width * defaults.height;
      const width = whole(Math.sqrt(area * is), stride.width), height = whole(Math.sqrt(area / is), stride.height);
      const size = `${width}x${height}`, isLegal = width <= limits.width && height <= limits.height;
      if (isLegal && !found.has(size)) found.set(size, `${width}×${height}${text}`);
    }
  return [...found];
}

function fit(side) {  // limits, defaults and fixed values of the model that is chosen
  const model = modelOf(side);
  if (!model?.defaults) return;
  const { defaults, stride, is_distilled: isFixed } = model, { limits } = offers;
  const steps = field(side + 'num_inference_steps'), guidance = field(side + 'guidance_scale');
  Object.assign(steps, { max: limits.num_inference_steps, value: defaults.num_inference_steps, disabled: isFixed });
  guidance.value = defaults.guidance_scale;
  $('small', steps.parentElement).textContent = isFixed ? 'Fixed: the model is distilled to these' : '';
  $('small', guidance.parentElement).textContent = isFixed ? `Distilled for ${defaults.guidance_scale}` : '1 is off';
  options(side + 'decoder', [['', 'The VAE’s own'], ...model.decoder.map(name => [name, `${name}: small and fast`])]);
  if (side) return tell();
  const classes = offers.slo_class.filter((one, i) => i === 0 || model.has_profile || !one.deadline_s);
  options('slo_class', classes.map(({ name }) => [name, name]));
  options('size', sizes(model, limits));
  const most = Math.min(limits.num_frames, 2 * defaults.num_frames - 1);
  Object.assign(field('num_frames'), { min: 1, step: stride.num_frames, max: most, value: defaults.num_frames });
  field('negative_prompt').placeholder = defaults.negative_prompt || 'What the clip does not show';
  const isBundled = offers.bundled.includes(model.id), length = (defaults.num_frames / defaults.fps).toFixed(0);
  const about = isBundled ? 'A tiny model of coloured shapes, nothing else' : model.notes || model.title || model.id;
  const takes = isFixed ? `made in ${defaults.num_inference_steps} steps` : 'in any number of steps';
  $('.about').textContent = `${about}; ${defaults.width}×${defaults.height}, ${length} s, ${takes}`;
  $('.examples').replaceChildren(...EXAMPLES[isBundled ? 'shapes' : 'other'].map(text =>
    button(text, () => { field('prompt').value = text; tell(); field('prompt').focus(); }, { class: 'chip' })));
  tell();
}

function tell() {  // what the form says of itself, and whether it can act
  const frames = Number(field('num_frames').value), fps = modelOf('')?.defaults?.fps ?? 16;
  for (const input of form.querySelectorAll('[type=range]')) $('.value', input.parentElement).textContent = input.value;
  $('.value', field('num_frames').parentElement).textContent = `${(frames / fps).toFixed(1)} s`;
  $('small', field('num_frames').parentElement).textContent = `${frames} frame${frames > 1 ? 's' : ''}`;
  const isUnused = Number(field('guidance_scale').value) === 1, isTwo = field('compare').checked;
  field('negative_prompt').disabled = isUnused;
  $('small', field('negative_prompt').parentElement).textContent = isUnused ? 'Counts only with guidance above 1' : '';
  $('.lora').hidden = field('lora').options.length < 2;
  $('.of-a').hidden = !isTwo;
  $('.versus').hidden = $('.versus').disabled = !isTwo;
  $('.primary').textContent = isTwo ? 'Generate both' : 'Generate';
  $('.primary').disabled = !offers || Boolean(run) || !field('prompt').value.trim();
}

// One side's settings. What is left at the model's default is left out, for a budget may choose it.
function settings(side) {
  const value = name => field(name).value, { defaults = {} } = modelOf(side) ?? {}, found = {};
  const [width, height] = value('size').split('x').map(Number);
  const asked = { width, height, num_frames: Number(value('num_frames')),
    num_inference_steps: Number(value(side + 'num_inference_steps')), guidance_scale: Number(value(side + 'guidance_scale')) };
  for (const [name, one] of Object.entries(asked)) if (one && name in defaults && one !== defaults[name]) found[name] = one;
  if (!field('negative_prompt').disabled) found.negative_prompt = value('negative_prompt');
  if (value('lora')) found.lora = [{ path: value('lora'), strength: Number(value('strength')) }];
  const named = { model: value(side + 'model'), decoder: value(side + 'decoder'), slo_class: value('slo_class') };
  return { ...found, ...named, prompt: value('prompt'), seed: value('seed').trim() };
}
