// A live stream as a texture: put it on a GameObject with a RawImage, or use `Texture` in a material.
//
// The left and right arrows turn, space pauses, R resets; other scripts call Session.PushPrompt. RGBA8 rings only.
using Unity.Collections.LowLevel.Unsafe;
using UnityEngine;
using UnityEngine.UI;

namespace CFEngine
{
    [RequireComponent(typeof(RawImage))]
    public sealed class CFEngineView : MonoBehaviour
    {
        const float LookSeconds = 0.25f; // between two looks for a writer
        const uint TurnAction = 1;       // cfengine_actions.h

        [Tooltip("as in: cfengine serve --ring NAME")] public string ringName = "demo";

        public Texture2D Texture { get; private set; }
        public CfSession Session { get; private set; }
        public CfSessionState State { get { return state; } }

        RawImage image;
        CfFrame frame;
        CfSessionState state;
        CfResult said;
        ulong shownId, shownGeneration, turnGeneration;
        int turn;
        float nextLook;
        bool formatSaid;

        void Awake()
        {
            image = GetComponent<RawImage>();
            image.uvRect = new Rect(0, 1, 1, -1); // rows of a ring begin at the top, those of Unity at the bottom
        }

        void OnDisable()
        {
            if (Session != null) Session.Dispose();
            Session = null;
        }

        void OnDestroy()
        {
            if (Texture != null) Destroy(Texture);
        }

        void Update()
        {
            if (Session == null && !Look()) return;
            Session.PollState(ref state);
            Steer();
            // Unity does not say when its picture will be seen; one picture from now is the best guess
            long display = Native.cf_now_ns() + (long)(Time.unscaledDeltaTime * 1e9);
            if (!Session.TryAcquire(display, CfPolicy.Nearest, ref frame)) return;
            bool isNew = frame.Id != shownId || frame.Generation != shownGeneration;
            bool copied = isNew && Copy();
            bool whole = Session.Release(ref frame);
            if (!copied || !whole) return;
            Texture.Apply(false);
            shownId = frame.Id;
            shownGeneration = frame.Generation;
        }

        bool Look()
        {
            if (Time.unscaledTime < nextLook) return false;
            nextLook = Time.unscaledTime + LookSeconds;
            CfResult result;
            Session = CfSession.Open(ringName, out result);
            if (result < 0 && result != said) Debug.LogWarning(CfSession.LastError, this);
            said = result;
            return Session != null;
        }

        unsafe bool Copy()
        {
            if (frame.Format != CfFormat.Rgba8)
            {
                if (!formatSaid) Debug.LogError("ring " + ringName + " is NV12; start its writer with RGBA8", this);
                formatSaid = true;
                return false;
            }
            int width = (int)frame.Width, height = (int)frame.Height;
            if (Texture == null || Texture.width != width || Texture.height != height) Remake(width, height);
            var pixels = Texture.GetRawTextureData<byte>(); // the texture's own memory, no copy
            UnsafeUtility.MemCpyStride(pixels.GetUnsafePtr(), width * 4, frame.Planes.First.Data.ToPointer(),
                (int)frame.Planes.First.Stride, width * 4, height);
            return true;
        }

        void Remake(int width, int height)
        {
            if (Texture != null) Destroy(Texture);
            Texture = new Texture2D(width, height, TextureFormat.RGBA32, false, false); // no mipmaps, not linear
            Texture.wrapMode = TextureWrapMode.Clamp;
            image.texture = Texture;
        }

        void Steer()
        {
            ulong id;
            if (turnGeneration != state.Generation) turn = 0; // a writer that begins turns nowhere
            turnGeneration = state.Generation;
            int wanted = (Input.GetKey(KeyCode.RightArrow) ? 1 : 0) - (Input.GetKey(KeyCode.LeftArrow) ? 1 : 0);
            if (wanted != turn && Session.PushAction(TurnAction, wanted, out id) == CfResult.Success) turn = wanted;
            if (Input.GetKeyDown(KeyCode.Space))
                Session.Push(state.State == CfState.Paused ? CfEventKind.Resume : CfEventKind.Pause, out id);
            if (Input.GetKeyDown(KeyCode.R)) Session.Push(CfEventKind.Reset, out id);
        }
    }
}
