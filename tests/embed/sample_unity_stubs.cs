// As much of Unity's scripting interface as CFEngineView.cs names, written from its documentation, so that a compiler
// can read that file where there is no Unity. Nothing here runs.
using System;

namespace Unity.Collections
{
    public struct NativeArray<T> where T : struct { }
}

namespace Unity.Collections.LowLevel.Unsafe
{
    public static class NativeArrayUnsafeUtility
    {
        public static unsafe void* GetUnsafePtr<T>(this NativeArray<T> array) where T : struct { return null; }
    }

    public static class UnsafeUtility
    {
        public static unsafe void MemCpyStride(void* destination, int destinationStride, void* source, int sourceStride,
            int elementSize, int count) { }
    }
}

namespace UnityEngine
{
    public class Object
    {
        public static void Destroy(Object what) { }
    }

    public class MonoBehaviour : Object
    {
        public T GetComponent<T>() { return default(T); }
    }

    [AttributeUsage(AttributeTargets.Class)]
    public class RequireComponent : Attribute
    {
        public RequireComponent(Type type) { }
    }

    public class TooltipAttribute : Attribute
    {
        public TooltipAttribute(string text) { }
    }

    public struct Rect
    {
        public Rect(float x, float y, float width, float height) { }
    }

    public enum TextureFormat { RGBA32 = 4 }

    public enum TextureWrapMode { Clamp = 1 }

    public class Texture : Object
    {
        public int width { get; set; }
        public int height { get; set; }
        public TextureWrapMode wrapMode { get; set; }
    }

    public class Texture2D : Texture
    {
        public Texture2D(int width, int height, TextureFormat format, bool mipChain, bool linear) { }
        public Unity.Collections.NativeArray<T> GetRawTextureData<T>() where T : struct
        {
            return default(Unity.Collections.NativeArray<T>);
        }
        public void Apply(bool updateMipmaps) { }
    }

    public enum KeyCode { Space = 32, R = 114, RightArrow = 275, LeftArrow = 276 }

    public static class Input
    {
        public static bool GetKey(KeyCode key) { return false; }
        public static bool GetKeyDown(KeyCode key) { return false; }
    }

    public static class Time
    {
        public static float unscaledTime { get { return 0; } }
        public static float unscaledDeltaTime { get { return 0; } }
    }

    public static class Debug
    {
        public static void LogWarning(object what, Object where) { }
        public static void LogError(object what, Object where) { }
    }
}

namespace UnityEngine.UI
{
    public class RawImage : Object
    {
        public Texture texture { get; set; }
        public Rect uvRect { get; set; }
    }
}
