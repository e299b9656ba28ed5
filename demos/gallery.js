// The clips of the session, and settings that come back from one of them.
const took = {};
let clips = [], shown = [];

function display(some) {
  shown = some;
  if (some.length) show(some, clip => button('Use these settings', () => restore(clip.recipe)));
  else empty();
  list();
}

function keep(clip) {
  took[clip.model] = clip.seconds;
  clips = [clip, ...clips].slice(0, offers.max_kept);
  display([clip]);
}

function list() {
  const items = $('.gallery ul'), old = new Map([...items.children].map(item => [item.dataset.file, item]));
  $('.gallery').hidden = !clips.length;
  items.replaceChildren(...clips.map(clip => old.get(clip.file) ?? entry(clip)));
  clips.forEach((clip, i) => items.children[i].toggleAttribute('data-shown', shown.some(one => one.file === clip.file)));
}

function entry(clip) {
  const { prompt, seed } = clip.recipe.request, video = playable(clip, { tabindex: -1, 'aria-hidden': 'true' });
  return h('li', { 'data-file': clip.file, onmouseenter: () => video.play().catch(() => {}), onmouseleave: () => video.pause() },
    button(video, () => run || display([clip]), { class: 'thumb', 'aria-label': 'Show: ' + prompt }),
    h('p', {}, prompt),
    h('p', { class: 'words' }, [clip.model, seconds(total(clip)), `seed ${seed}`].map(word => h('span', {}, word))),
    h('p', { class: 'actions' }, button('Use these settings', () => restore(clip.recipe)),
      button('Compare', () => run || shown[0] === clip || display([shown[0], clip]), { class: 'quiet compare' })));
}

function empty() {
  $('.screen').dataset.state = 'empty';
  $('.screen').replaceChildren(h('div', { class: 'nothing' },
    h('div', { class: 'shapes', 'aria-hidden': 'true' }, h('i'), h('i'), h('i')),
    h('p', {}, h('b', {}, 'Your clip plays here')), h('p', {}, 'Describe a clip, or pick an example, and press Generate.')));
}

// Settings of a recipe, into the form; what the server does not have is said.
function restore({ request, model, decoder }) {
  const missing = [], put = (name, value, what) => {
    field(name).value = value;
    if (field(name).value !== value && missing.push(`${what} ${value}`)) field(name).selectedIndex = 0;
  };
  put('model', model.name_or_path, 'model');
  fit('');
  const size = `${request.width}x${request.height}`;
  if (![...field('size').options].some(one => one.value === size)) field('size').append(h('option', { value: size }, size));
  const [lora] = request.lora ?? [], same = ['prompt', 'negative_prompt', 'num_frames', 'guidance_scale', 'seed'];
  for (const name of same) field(name).value = request[name];
  Object.assign(field('size'), { value: size });
  if (!field('num_inference_steps').disabled) field('num_inference_steps').value = request.num_inference_steps;
  put('decoder', decoder?.name_or_path ?? '', 'decoder');
  put('lora', lora?.path ?? '', 'LoRA');
  Object.assign(field('strength'), { value: lora?.strength ?? 1 });
  Object.assign(field('count'), { value: 1 });
  field('slo_class').selectedIndex = 0;
  field('compare').checked = false;
  tell();
  complain(missing.length ? `This server does not have ${missing.join(', ')}; the other settings are back` : '');
  field('prompt').focus();
}

// The recipe is text in the head of the file, which never leaves the browser.
async function read(file) {
  const text = new TextDecoder('latin1').decode(await file.slice(0, 1 << 22).arrayBuffer());
  const begin = text.search(/\{"version": \d+, "model": \{/);
  let recipe = null;
  for (let end = begin; !recipe && begin >= 0 && (end = text.indexOf('}', end + 1)) > 0;)
    try { recipe = recipeOf(text.slice(begin, end + 1)); } catch { /* it goes on */ }
  if (recipe) restore(recipe);
  else complain(`${file.name} holds no recipe: it was not made by fastvideo, or was encoded anew`);
}
